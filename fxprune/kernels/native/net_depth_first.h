// Steps that are run depth first: each makes a row of tiles when another wants to read it, so that maps larger than a
// core's cache are read where they were just made, and of most only a few rows are ever kept.
//
// For each thread the planner writes down a band: in which order the rows of all steps are made so that the thread's
// share of the last map comes about. Rows that two bands need are made by whoever comes first, and stay; all others have
// places in their band's ring, which later rows take again.
#pragma once

#include <unistd.h>

#include <numeric>

#include "crew.h"
#include "net.h"

namespace fxprune {

// A row of tiles of a step, in a band. `flag` numbers those that several bands have; it is -1 for the others.
struct BandRow {
  int32_t step, y, flag;
  int32_t waits, waits_end;  // flags, by position, of what it reads that several bands have
};

struct DepthFirst : Step {
  enum { kOpen, kTaken, kDone };
  std::vector<std::unique_ptr<TileStep>> steps;
  std::vector<std::vector<BandRow>> bands;
  std::vector<int32_t> waits;
  int64_t first_flag = 0;

  void check(const Weights& weights) const override {
    for (const auto& step : steps) step->check(weights);
  }
  void prepare(Plan& plan) override {
    for (const auto& step : steps) step->prepare(plan);
  }
  int64_t scratch() const override {
    int64_t most = 0;
    for (const auto& step : steps) most = std::max(most, step->scratch());
    return most;
  }
  int64_t tasks(int64_t) const override { return bands.size(); }
  void run(const Plan& plan, const Frame& shared, int64_t task, int64_t, float* scratch) const override {
    Frame f = shared;
    f.shared = false;
    std::atomic<int>* const flags = f.flags + first_flag;
    for (const BandRow& row : bands[task]) {
      if (row.flag >= 0) {
        int open = kOpen;
        if (!flags[row.flag].compare_exchange_strong(open, kTaken, std::memory_order_relaxed)) continue;
      }
      // Who took such a row is making it, or waits for another that is being made.
      for (int32_t w = row.waits; w < row.waits_end; ++w)
        for (int64_t n = 0; flags[waits[w]].load(std::memory_order_acquire) != kDone; ++n) rest_a_moment(n);
      const TileStep& step = *steps[row.step];
      const int64_t tiles = plan.maps[step.value].tiles_x();
      for (int64_t t = row.y * tiles; t < (row.y + 1) * tiles; ++t) step.make(plan, f, t, {}, scratch);
      if (row.flag >= 0) flags[row.flag].store(kDone, std::memory_order_release);
    }
  }
};

// What a core's own cache holds, in bytes.
inline int64_t near_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  static const int64_t size = 0;
#endif
  return size > 0 ? size : 1 << 20;
}

// Where rows of one size and another lie next to each other for a while: the first place that is large enough.
class Ring {
 public:
  int64_t take(int64_t floats) {
    int64_t at = 0;
    auto next = taken_.begin();
    for (; next != taken_.end() && next->first < at + floats; ++next) at = next->first + next->second;
    taken_.insert(next, {at, floats});
    most_ = std::max(most_, at + floats);
    return at;
  }
  void give_back(int64_t at) {
    taken_.erase(std::find_if(taken_.begin(), taken_.end(), [&](const auto& each) { return each.first == at; }));
  }
  int64_t most() const { return most_; }

 private:
  std::vector<std::pair<int64_t, int64_t>> taken_;  // where, and how many floats, in order
  int64_t most_ = 0;
};

// The bands for steps [first, end) of a plan whose maps name their storages and have no places yet.
class Bands {
 public:
  // `inside` says of a storage whether only these steps read and write it.
  Bands(const Plan& plan, int64_t first, int64_t end, int64_t bands, const std::vector<bool>& inside)
      : plan_(plan), first_(first), inside_(inside), bands_(bands) {
    for (int64_t s = first; s < end; ++s) {
      const auto* step = dynamic_cast<const TileStep*>(plan.steps[s].get());
      steps_.push_back(step);
      base_.push_back(needs_.size());
      needs_.resize(needs_.size() + plan.maps[step->value].grid.bh);
    }
    link();
    for (int64_t s = steps_.size() - 1; s >= 0; --s) want(s);
    lay_out();
  }

  int64_t kept_floats() const { return kept_; }  // of rows that several bands have
  int64_t ring_floats() const { return ring_; }  // of one band
  int64_t floats() const { return kept_ + bands_.size() * ring_; }
  // Work of all threads together while they wait for the one that has most.
  double idle() const {
    std::vector<double> work(bands_.size());
    for (size_t item = 0; item < needs_.size(); ++item) {
      const TileStep& step = *steps_[step_of(item)];
      const auto many = std::count_if(in_.begin(), in_.end(), [&](const auto& in) { return in[item]; });
      for (size_t b = 0; b < bands_.size(); ++b)
        if (in_[b][item]) work[b] += step.work / plan_.maps[step.value].grid.bh / many;
    }
    const double most = *std::max_element(work.begin(), work.end());
    return most * work.size() - std::accumulate(work.begin(), work.end(), 0.0);
  }
  // Where the rows of a storage that is inside lie.
  std::vector<int64_t> rows_of(int64_t storage) const {
    std::vector<int64_t> result;
    for (const Place& place : places_.at(storage))
      result.push_back(place.band < 0 ? place.at : kept_ + place.band * ring_ + place.at);
    return result;
  }
  std::unique_ptr<DepthFirst> step(Plan& plan) const {
    auto result = std::make_unique<DepthFirst>();
    result->first_flag = plan.flags;
    plan.flags += flags_;
    for (const auto& band : bands_) {
      std::vector<BandRow> rows;
      for (const int32_t item : band) {
        const int32_t step = step_of(item), waits = result->waits.size();
        for (const int32_t need : needs_[item])
          if (flag_[need] >= 0) result->waits.push_back(flag_[need]);
        rows.push_back({step, static_cast<int32_t>(item - base_[step]), flag_[item], waits, static_cast<int32_t>(result->waits.size())});
      }
      result->bands.push_back(std::move(rows));
    }
    for (size_t s = 0; s < steps_.size(); ++s)
      result->steps.emplace_back(static_cast<TileStep*>(plan.steps[first_ + s].release()));
    return result;
  }

 private:
  // Rows of storages: which items write or read them, and where they lie. Items number the rows of all steps.
  struct Place {
    std::vector<int32_t> users = {};
    int32_t band = -1;  // -1: it is kept
    int64_t at = -1;
  };

  int32_t step_of(int32_t item) const {
    return std::upper_bound(base_.begin(), base_.end(), item) - base_.begin() - 1;
  }
  Place& place(const Row& row) {
    const Map& map = plan_.maps[row.map];
    std::vector<Place>& rows = places_[map.storage];
    if (rows.empty()) rows.resize(map.grid.bh);
    return rows[row.y];
  }

  void link() {
    std::vector<Row> rows;
    for (size_t s = 0; s < steps_.size(); ++s)
      for (int64_t y = 0; y < plan_.maps[steps_[s]->value].grid.bh; ++y) {
        const int32_t item = base_[s] + y;
        rows.clear();
        steps_[s]->add_reads(plan_, y, rows);
        for (const Row& row : rows) {
          std::vector<int32_t>& users = place(row).users;
          // Until now these are what writes the row, and what reads it too: this item, if it reads the row twice.
          for (const int32_t user : users)
            if (user != item && writes(user, row)) needs_[item].push_back(user);
          users.push_back(item);
        }
        place({steps_[s]->value, y}).users.push_back(item);
      }
    for (auto& needs : needs_) {
      std::sort(needs.begin(), needs.end());
      needs.erase(std::unique(needs.begin(), needs.end()), needs.end());
    }
  }
  bool writes(int32_t item, const Row& row) const {
    const int32_t s = step_of(item);
    return plan_.maps[steps_[s]->value].storage == plan_.maps[row.map].storage && item - base_[s] == row.y;
  }

  // Puts the rows of a step that no band has yet, and all that they need, into the bands, to each its share.
  void want(int64_t s) {
    if (in_.empty()) in_.assign(bands_.size(), std::vector<bool>(needs_.size()));
    const int64_t rows = plan_.maps[steps_[s]->value].grid.bh, bands = bands_.size();
    for (int64_t b = 0; b < bands; ++b)
      for (int64_t y = rows * b / bands; y < rows * (b + 1) / bands; ++y) {
        const int32_t item = base_[s] + y;
        if (std::none_of(in_.begin(), in_.end(), [&](const auto& in) { return in[item]; })) add(b, item);
      }
  }
  void add(int64_t b, int32_t item) {
    if (in_[b][item]) return;
    in_[b][item] = true;
    for (const int32_t need : needs_[item]) add(b, need);
    bands_[b].push_back(item);
  }

  void lay_out() {
    flag_.assign(needs_.size(), -1);
    std::vector<int32_t> band_of(needs_.size(), -1);
    for (size_t item = 0; item < needs_.size(); ++item) {
      int64_t many = 0;
      for (size_t b = 0; b < bands_.size(); ++b)
        if (in_[b][item]) ++many, band_of[item] = b;
      if (many > 1) band_of[item] = -1, flag_[item] = flags_++;
    }
    std::vector<int32_t> turn(needs_.size());
    for (const auto& band : bands_)
      for (size_t n = 0; n < band.size(); ++n)
        if (flag_[band[n]] < 0) turn[band[n]] = n;
    // By band and turn: the rows that are written for the first time, and those that nobody reads later.
    struct Turn {
      std::vector<std::pair<Place*, int64_t>> begin;
      std::vector<Place*> end;
    };
    std::vector<std::vector<Turn>> turns;
    for (const auto& band : bands_) turns.emplace_back(band.size());
    for (auto& [storage, rows] : places_) {
      if (!inside_[storage]) continue;
      const auto map = std::find_if(plan_.maps.begin(), plan_.maps.end(), [&](const Map& m) { return m.storage == storage; });
      for (Place& row : rows) {
        if (row.users.empty()) continue;
        const int32_t band = band_of[row.users[0]];
        if (band < 0 || std::any_of(row.users.begin(), row.users.end(), [&](int32_t user) { return band_of[user] != band; })) {
          row.at = kept_;
          kept_ += map->row_floats();
          continue;
        }
        row.band = band;
        const auto [low, high] = std::minmax_element(
            row.users.begin(), row.users.end(), [&](int32_t a, int32_t b) { return turn[a] < turn[b]; });
        turns[band][turn[*low]].begin.push_back({&row, map->row_floats()});
        turns[band][turn[*high]].end.push_back(&row);
      }
    }
    for (auto& band : turns) {
      Ring ring;
      for (Turn& each : band) {
        for (auto& [row, floats] : each.begin) row->at = ring.take(floats);
        for (Place* row : each.end) ring.give_back(row->at);
      }
      ring_ = std::max(ring_, ring.most());
    }
  }

  const Plan& plan_;
  const int64_t first_;
  const std::vector<bool>& inside_;
  std::vector<const TileStep*> steps_;
  std::vector<int32_t> base_;                // the first item of each step
  std::vector<std::vector<int32_t>> needs_;  // by item: the items that must be done before
  std::vector<std::vector<int32_t>> bands_;  // items in their order
  std::vector<std::vector<bool>> in_;        // by band and item
  std::vector<int32_t> flag_;
  std::map<int64_t, std::vector<Place>> places_;  // by storage and row
  int64_t flags_ = 0, kept_ = 0, ring_ = 0;
};

}  // namespace fxprune
