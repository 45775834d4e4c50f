// Defines the ops of fxprune in a process that does not import it. `schemas`, which build puts before this text, has
// one schema a line, as Python's `register` would define it.
//
// Where Python has defined an op first, or another package, defining it again is an error that changes nothing and is
// passed over: what is there is what this would define. The library stays in the process, and its definitions with it.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>

// New in torch 2.12. Without them Inductor does not know that an op wants its inputs in the strides that it saw.
extern "C" {
__attribute__((weak)) AOTITorchError torch_library_def_with_tags(
    TorchLibraryHandle self, const char* schema, const int32_t* tags, int32_t count);
__attribute__((weak)) int32_t torch_tag_needs_fixed_stride_order();
}

namespace {

bool define() {
  TorchLibraryHandle library = nullptr;
  if (aoti_torch_library_init_fragment("fxprune", __FILE__, __LINE__, &library) != AOTI_TORCH_SUCCESS) return false;
  for (const char* schema : schemas) {
    if (torch_library_def_with_tags && torch_tag_needs_fixed_stride_order) {
      const int32_t tag = torch_tag_needs_fixed_stride_order();
      torch_library_def_with_tags(library, schema, &tag, 1);
    } else {
      aoti_torch_library_def(library, schema);
    }
  }
  return true;
}

const bool defined = define();

}  // namespace
