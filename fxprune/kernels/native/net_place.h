// Where the maps of a plan lie, and which steps are run depth first.
#pragma once

#include <cmath>
#include <optional>

#include "net_depth_first.h"
#include "net_steps.h"

namespace fxprune {

// A step that writes or reads a map.
struct Use {
  int64_t step, map;
};

// What runs of steps that are depth first must keep to; by default what the machine's caches ask for.
struct Limits {
  int64_t large = near_bytes() / 4;     // bytes from which on a map is worth it, for each thread
  int64_t near = near_bytes() * 3 / 4;  // bytes of rings and weights that stay near
  bool weighs_idle = true;  // whether bytes are saved only where no thread idles for longer than they would have taken
};

// Vectors that are multiplied in the time that goes by for a byte that leaves a core's cache and comes back while others
// are multiplied: by running depth first ResNet-50 saves 25 MB and 2% of its time, MobileNetV2 20 MB and 18%.
constexpr double kWorkPerByte = 1.0 / 16;

// Gives each map its place in the arena, where what is alive at the same time does not overlap. Until then `storage`
// numbers what lies together.
class Placer {
 public:
  Placer(Plan& plan, std::vector<Use> uses, int64_t storages, int64_t bands, const Limits& limits)
      : plan_(plan), uses_(std::move(uses)), bands_(bands), limits_(limits), storages_(storages) {}

  void place() {
    measure();
    choose_runs();
    measure();
    take_over();
    lay_out();
    gather_runs();
    for (const auto& step : plan_.steps) step->prepare(plan_);
    for (const auto& step : plan_.steps) plan_.scratch = std::max(plan_.scratch, step->scratch());
    plan_.scratch = ceil_div(plan_.scratch, 1024) * 1024;
  }

 private:
  struct Storage {
    int64_t floats = 0, first = -1, last = -1, at = 0;
  };
  struct Run {
    int64_t first, end;  // steps
    std::unique_ptr<Bands> bands;
  };

  const Map& at(int64_t map) const { return plan_.maps[map]; }

  // Floats of each storage, and the first and the last step that uses it.
  void measure() {
    storages_.assign(storages_.size(), {});
    for (const auto& [step, map] : uses_) {
      Storage& s = storages_[at(map).storage];
      s.floats = std::max(s.floats, at(map).floats());
      s.first = s.first < 0 ? step : std::min(s.first, step), s.last = std::max(s.last, step);
    }
  }

  std::vector<bool> inside(int64_t first, int64_t end) const {
    std::vector<bool> result;
    for (const Storage& s : storages_) result.push_back(s.first >= first && s.last < end);
    return result;
  }

  bool is_large(const Storage& s) const { return s.floats * int64_t{sizeof(float)} >= limits_.large * bands_; }

  // Bytes of the weights of steps [first, end).
  int64_t weight_bytes(int64_t first, int64_t end) const {
    int64_t bytes = 0;
    for (int64_t s = first; s < end; ++s) bytes += plan_.steps[s]->weight_bytes();
    return bytes;
  }

  // Bytes of large maps that do not leave a core's cache where steps [first, end) are run depth first, less what could
  // have passed while threads wait for others; nothing where their rows and weights do not fit into it.
  std::optional<int64_t> saved(int64_t first, int64_t end, const Bands& bands) const {
    constexpr int64_t kBytes = sizeof(float);
    // Places of a storage are 32-bit numbers.
    if (bands.floats() >= INT32_MAX || bands.ring_floats() * kBytes + weight_bytes(first, end) > limits_.near) return {};
    int64_t floats = -bands.kept_floats();
    for (const Storage& s : storages_)
      if (s.first >= first && s.last < end && is_large(s)) floats += s.floats;
    return floats * kBytes - (limits_.weighs_idle ? std::llround(bands.idle() / kWorkPerByte) : 0);
  }

  // Runs of neighbouring steps through which large maps pass, each as long as it gains by it.
  void choose_runs() {
    const int64_t steps = plan_.steps.size();
    for (int64_t first = 0, end; first < steps; first = end) {
      end = first + 1;
      if (!dynamic_cast<const TileStep*>(plan_.steps[first].get())) continue;
      int64_t most = 0;
      std::unique_ptr<Bands> best;
      for (int64_t last = first + 1; last < steps && goes_on(first, last); ++last) {
        const std::vector<bool> own = inside(first, last + 1);
        auto bands = std::make_unique<Bands>(plan_, first, last + 1, bands_, own);
        const std::optional<int64_t> bytes = saved(first, last + 1, *bands);
        if (!bytes) break;
        if (*bytes > 0 && *bytes >= most) most = *bytes, best = std::move(bands), end = last + 1;
      }
      if (best) use(first, end, std::move(best));
    }
  }

  // Whether step `next` may follow steps [first, next), and a large map is made in these that it or a later one reads.
  bool goes_on(int64_t first, int64_t next) const {
    if (!dynamic_cast<const TileStep*>(plan_.steps[next].get())) return false;
    return std::any_of(storages_.begin(), storages_.end(), [&](const Storage& s) {
      return s.first >= first && s.first < next && s.last >= next && is_large(s);
    });
  }

  // The maps inside a run get their rows, all in one storage.
  void use(int64_t first, int64_t end, std::unique_ptr<Bands> bands) {
    const std::vector<bool> own = inside(first, end);
    const int64_t whole = storages_.size();
    for (Map& map : plan_.maps)
      if (own[map.storage]) map.rows = bands->rows_of(map.storage), map.storage = whole;
    storages_.push_back({});
    runs_.push_back({first, end, std::move(bands)});
  }

  bool is_whole(int64_t map) const { return at(map).all_channels == at(map).channels; }
  bool in_a_run(int64_t step) const {
    return std::any_of(runs_.begin(), runs_.end(), [&](const Run& run) { return run.first <= step && step < run.end; });
  }

  // What takes over the place of a map that nobody reads later lies where that lay.
  void take_over() {
    std::vector<int64_t> last(plan_.maps.size(), -1);
    for (const auto& [now, map] : uses_) last[map] = std::max(last[map], now);
    for (int64_t now = 0; now < static_cast<int64_t>(plan_.steps.size()); ++now) {
      const auto [made, old] = plan_.steps[now]->takes_over();
      if (made < 0 || old < 0 || in_a_run(now) || !plan_.alone(made) || !is_whole(old) || last[old] != now) continue;
      bool others_live = false;
      for (int64_t m = 0; m < static_cast<int64_t>(plan_.maps.size()); ++m)
        others_live |= m != old && at(m).storage == at(old).storage && last[m] >= last[old];
      if (others_live) continue;
      const auto times = std::count_if(uses_.begin(), uses_.end(), [&](const Use& use) { return use.step == now && use.map == old; });
      if (times == 1) plan_.maps[made].storage = at(old).storage;
    }
  }

  void lay_out() {
    measure();
    for (const Run& run : runs_) {
      // All of a run's steps are one.
      for (Storage& s : storages_) {
        if (s.first >= run.first && s.first < run.end) s.first = run.first;
        if (s.last >= run.first && s.last < run.end) s.last = run.end - 1;
      }
    }
    for (size_t r = 0; r < runs_.size(); ++r)
      storages_[storages_.size() - runs_.size() + r].floats = runs_[r].bands->floats();
    std::vector<Storage*> order;
    for (Storage& s : storages_)
      if (s.first >= 0) order.push_back(&s);
    std::stable_sort(order.begin(), order.end(), [](auto* a, auto* b) { return a->floats > b->floats; });
    std::vector<Storage*> placed;
    for (Storage* s : order) {
      std::vector<Storage*> alive;
      for (Storage* p : placed)
        if (p->first <= s->last && s->first <= p->last) alive.push_back(p);
      std::sort(alive.begin(), alive.end(), [](auto* a, auto* b) { return a->at < b->at; });
      s->at = 0;
      for (Storage* p : alive)
        if (p->at < s->at + s->floats && s->at < p->at + p->floats) s->at = p->at + p->floats;
      plan_.arena = std::max(plan_.arena, s->at + s->floats);
      placed.push_back(s);
    }
    for (Map& m : plan_.maps) m.storage = storages_[m.storage].at;
  }

  // The steps of a run become one.
  void gather_runs() {
    std::vector<std::unique_ptr<Step>> steps;
    size_t next = 0;
    for (const Run& run : runs_) {
      while (next < static_cast<size_t>(run.first)) steps.push_back(std::move(plan_.steps[next++]));
      steps.push_back(run.bands->step(plan_));
      next = run.end;
    }
    while (next < plan_.steps.size()) steps.push_back(std::move(plan_.steps[next++]));
    plan_.steps = std::move(steps);
  }

  Plan& plan_;
  const std::vector<Use> uses_;
  const int64_t bands_;
  const Limits limits_;
  std::vector<Storage> storages_;
  std::vector<Run> runs_;
};

}  // namespace fxprune
