// The visits of a leaf against the golden table of the schedule.
#include "visits.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>
#include <tuple>
#include <utility>

#include "check.h"

namespace {

struct Row {
  long slots, first_tile, tile, step, terms, slot;
};

}  // namespace

int main() {
  std::FILE* file = std::fopen(JPK_GOLDEN_SCHEDULE, "r");
  CHECK(file != nullptr, "%s cannot be read", JPK_GOLDEN_SCHEDULE);
  if (file == nullptr) return report();
  // Of a leaf and a step, the terms of every tile.
  std::map<std::tuple<long, long, long>, std::map<long, long>> table;
  CHECK(std::fscanf(file, "%*[^\n]") == 0, "no line of names");
  Row row;
  while (std::fscanf(file, "%ld,%ld,%ld,%ld,%ld,%ld", &row.slots, &row.first_tile, &row.tile,
                     &row.step, &row.terms, &row.slot) == 6) {
    table[{row.slots, row.first_tile, row.step}][row.tile] = row.terms;
    CHECK(row.slot == (row.slots ? row.step % row.slots : 0), "slot %ld", row.slot);
  }
  std::fclose(file);
  CHECK(table.size() > 50, "%zu steps", table.size());

  for (const auto& [key, tiles] : table) {
    const auto [slots, first_tile, step] = key;
    const int64_t size = static_cast<int64_t>(tiles.size()) * jpk::kTile;
    const jpk::Shard whole{};
    jpk::Visits visits(whole, first_tile, slots, step, 0, size);
    int64_t seen = 0;
    while (const jpk::Visit* visit = visits.next()) {
      for (int64_t s = 0; s < visit->spans; ++s) {
        const jpk::Span& span = visit->span[s];
        seen += span.count;
        for (int64_t i = 0; i < span.count; ++i) {
          const long tile = static_cast<long>((span.here + i) / jpk::kTile);
          CHECK(visit->terms == tiles.at(tile), "slots %ld first tile %ld step %ld tile %ld: %d",
                slots, first_tile, step, tile, int(visit->terms));
        }
      }
    }
    CHECK(seen == size, "%d elements of %d", int(seen), int(size));
  }
  return report();
}
