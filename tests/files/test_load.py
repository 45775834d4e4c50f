"""What is no file of ours, not whole, or not to be trusted is refused with what is wrong; nothing in it is run."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import FileError
from fxprune.files.conditions import is_arithmetic
from fxprune.files.container import read, write
from fxprune.files.ops import name_of, op_of
from tests.files.test_save import MOST, mlp, transform

Document = dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "model.safetensors"
    return fxprune.save(transform(mlp(), MOST, (torch.randn(5, 40),), layout="dense"), path)


def changed(saved: Path, target: Path, change: Callable[[Document], Any]) -> Path:
    document, tensors = read(saved)
    change(document)
    write(target, document, tensors)
    return target


def test_other_files_are_told_for_what_they_are(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content, why in (
        (b"", "no safetensors file"),
        (pickle.dumps({"a": 1}), "no safetensors file"),
        (saved.read_bytes()[:-1], "no safetensors file"),
        (saved.read_bytes()[:100], "no safetensors file"),
        (saved.read_bytes() + b"1", "no safetensors file"),
        (b"\xff" * 64, "no safetensors file"),
    ):
        path.write_bytes(content)
        with pytest.raises(FileError, match=why):
            fxprune.load(path)
    safetensors.torch.save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(FileError, match=r"fxprune did not write it.*load_state_dict"):
        fxprune.load(path)
    with pytest.raises(FileError, match="there is no such file"):
        fxprune.load(tmp_path / "none")
    with pytest.raises(FileError, match="it is a folder"):
        fxprune.load(tmp_path)


def test_a_bit_that_is_another_is_seen_in_every_part(saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    path = tmp_path / "file"
    for at in (*range(len(data) - 1, 8, -len(data) // 40), 9, 200):
        other = bytearray(data)
        other[at] ^= 4
        path.write_bytes(bytes(other))
        with pytest.raises(FileError):
            fxprune.load(path)


def test_a_newer_version_is_told(saved: Path, tmp_path: Path) -> None:
    with safetensors.safe_open(saved, "pt") as file:
        header, tensors = file.metadata(), {key: file.get_tensor(key) for key in list(file.keys())}
    safetensors.torch.save_file(tensors, tmp_path / "file", {**header, "fxprune": "2"})
    with pytest.raises(FileError, match=r"version 2.*Install a newer fxprune"):
        fxprune.load(tmp_path / "file")


def guard(text: str) -> Callable[[Document], Any]:
    entry = lambda document: document["entry"]["EntryCheck"]  # noqa: E731
    return lambda document: entry(document).update(guards={"tuple": [{"tuple": [text, "x"]}]})


def node(place: int, part: int, value: Any) -> Callable[[Document], Any]:
    return lambda document: document["graph"]["nodes"][place].__setitem__(part, value)


def first_linear(part: int, value: Any) -> Callable[[Document], Any]:
    def change(document: Document) -> None:
        found = next(n for n in document["graph"]["nodes"] if n[2] == "aten.linear.default")
        found[part] = value

    return change


BAD: dict[str, tuple[Callable[[Document], Any], str]] = {
    "code as a condition": (guard("__import__('os').system('true') == 0"), "no arithmetic"),
    "code behind a tensor": (guard("a[0].__class__ is None"), "no arithmetic"),
    "a condition without end": (guard("2**10**10**10 > 0"), "no arithmetic"),
    "another input's condition": (guard("a[0].data_ptr() > 0"), "no arithmetic"),
    "an op that opens files": (first_linear(2, "aten.from_file.default"), "reaches for files"),
    "TorchScript's op that writes": (first_linear(2, "aten.save.default"), "none of this name"),
    "a module's function": (first_linear(2, "os.system.default"), "operators=\\['os'\\]"),
    "an attribute for an op": (first_linear(2, "aten.__class__.default"), "none of this name"),
    "no op": (first_linear(2, "eval"), "no such operator"),
    "a method": (first_linear(0, "call_method"), "there is no node"),
    "a name with code in it": (node(0, 2, "x): import os #"), "an input cannot be called"),
    "a part with code in its name": (
        lambda d: d["graph"]["nodes"].insert(1, ["get_attr", "a", 'x"); y("', {"tuple": []}, {"dict": []}]),
        "a part cannot be called",
    ),
    "a keyword with code in it": (first_linear(4, {"dict": [["x=1) #", 2]]}), "arguments of"),
    "arguments by a name of Python": (lambda d: d["graph"]["call"].update(names=["import"]), "have no names"),
    "a node that comes later": (first_linear(3, {"tuple": [{"node": 9999}]}), "graph is broken"),
    "no output": (lambda d: d["graph"]["nodes"].pop(), "graph is broken"),
    "a part that is not there": (lambda d: d["modules"].pop(), "which|broken|attribute"),
    "a class of its own": (lambda d: d["modules"][-1].update({"class": "os.system"}), "modules are broken"),
    "a tensor that is not there": (
        lambda d: d["modules"][-1]["parameters"].update(bias={"tensor": "b", "trains": False}),
        "does not hold",
    ),
    "a dtype that there is not": (
        lambda d: d["entry"]["EntryCheck"].update(inputs={"tuple": [{"dtype": "float99"}]}),
        "unknown, or broken",
    ),
    "code for a flag": (
        lambda d: d["entry"]["EntryCheck"]["inputs"]["tuple"][0]["TensorInput"].update(contiguous="exit()"),
        "'contiguous' cannot be",
    ),
    "code for a size": (
        lambda d: d["entry"]["EntryCheck"]["inputs"]["tuple"][0]["TensorInput"].update(sizes={"tuple": ["exit()", 40]}),
        "of sizes",
    ),
    "an option of the compiler": (
        lambda d: d["settings"]["Settings"].update(mode={"dict": [["cpp.cxx", "sh"]]}),
        "'mode' cannot be",
    ),
    "a record of another kind": (lambda d: d.update(report=d["selection"]), "should be"),
    "a field that is none": (lambda d: d["report"]["Report"].update(more=1), "has no 'more'"),
    "a record without a field": (lambda d: d["report"]["Report"].pop("model"), "is missing"),
    "a mask that is too short": (
        lambda d: next(iter(d["selection"]["Selection"]["mask"]["dict"]))[1]["PackedMask"].update(
            shape={"tuple": [999, 40]}
        ),
        "as many bits",
    ),
    "another kind of file": (lambda d: d.update(kind="model"), "holds a 'model'"),
    "no kind": (lambda d: d.pop("kind"), "broken"),
    "a list for all": (lambda d: d.update(graph=[1, 2]), "broken"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_to_be_trusted_is_refused(name: str, saved: Path, tmp_path: Path) -> None:
    change, why = BAD[name]
    with pytest.raises(FileError, match=why) as error:
        fxprune.load(changed(saved, tmp_path / "file", change), progress=False)
    assert str(tmp_path / "file") in str(error.value)


def test_operators_of_others_are_taken_on_trust_alone(tmp_path: Path) -> None:
    library = torch.library.Library("fxprune_test_files", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
    torch.library.register_fake("fxprune_test_files::twice", torch.empty_like, lib=library)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.fxprune_test_files.twice(self.linear(x))

    x = torch.randn(3, 8)
    result = transform(Model().eval(), None, (x,))
    path = fxprune.save(result, tmp_path / "model.safetensors")
    with pytest.raises(FileError, match=r"operators=\['fxprune_test_files'\]"):
        fxprune.load(path)
    assert torch.equal(fxprune.load(path, operators=["fxprune_test_files"])(x), result(x))


@pytest.mark.parametrize(
    "text",
    [
        "a[0].size()[1] <= 512",
        "max(a[0].size()[0], 2) % 8 == 0",
        "(a[1] + 3) // 2 > math.floor(2.5)",
        "a[0].size()[0]**2 > 3",
    ],
)
def test_arithmetic_is_arithmetic(text: str) -> None:
    assert is_arithmetic(text)


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "a.size()",
        "exit()",
        "max",
        "math",
        "a[0].size",
        "a[0].item()",
        "a['x']",
        "[x for x in a]",
        "lambda: 1",
        "a[0].size()[a]",
        "math.__dict__",
        "torch.load('x')",
        "'a' * 10**9",
        "9**9**9",
        "a[0].size(1)",
        "f'{a}'",
        "max(a)",
        "2**a[0].size()[0] > 1",
        "(",
        "1" * 30_000,
    ],
)
def test_what_is_no_arithmetic_is_seen(text: str) -> None:
    assert not is_arithmetic(text)


def test_ops_have_names_and_names_have_ops() -> None:
    for op in (torch.ops.aten.linear.default, torch.ops.aten.add.Tensor, torch.sym_max, torch.ops.higher_order.cond):
        assert op_of(name_of(op, "n")) is op
    with pytest.raises(FileError, match=r"node n"):
        name_of(print, "n")


def test_a_device_that_is_not_here_is_told(saved: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(FileError, match=r'for cuda.*device="cpu"'):
            fxprune.load(saved, device="cuda")
    assert fxprune.load(saved, device="cpu").report
