// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/link_chain_forms.h"

#include <iterator>
#include <utility>

namespace expertd::bench {
namespace {

using Form = ChainForm;
using Step = ChainStep;
using Kind = ChainStepKind;

/// Chunks that end at these eighths, the words behind them of this kind, on `streams` streams in turn.
Form chunks(std::string name, const std::vector<uint32_t>& ends, const Kind* tell, uint32_t streams) {
  Form form;
  form.name = std::move(name);
  uint32_t first = 0;
  for (uint32_t c = 0; c < ends.size(); ++c) {
    const uint32_t stream = c % streams;
    form.steps.push_back({stream, Kind::kRows, first, ends[c]});
    if (tell != nullptr) {
      form.steps.push_back({stream, *tell, c, 0});
    }
    first = ends[c];
  }
  if (streams > 1) {  // the last chunk that is not of the first stream is the last of its stream
    const uint32_t last = static_cast<uint32_t>(ends.size()) - 1;
    const uint32_t other = last % streams == 0 ? last - 1 : last;
    form.steps.push_back({other % streams, Kind::kMark, other, 0});
    form.steps.push_back({0, Kind::kAwait, other, 0});
  }
  return form;
}

/// A chunk is told only when those before it were, by whichever stream.
Form told_in_order(const std::vector<uint32_t>& ends) {
  Form form;
  form.name = "5 chunks, words, two streams in turn, told in order";
  uint32_t first = 0;
  for (uint32_t c = 0; c < ends.size(); ++c) {
    form.steps.push_back({c % 2, Kind::kRows, first, ends[c]});
    if (c != 0) {
      form.steps.push_back({c % 2, Kind::kAwait, c - 1, 0});
    }
    form.steps.push_back({c % 2, Kind::kTell, c, 0});
    form.steps.push_back({c % 2, Kind::kMark, c, 0});
    first = ends[c];
  }
  return form;  // the last of five is on the first stream, behind all others
}

/// One stream copies and records events, another tells behind them.
Form told_aside(const std::vector<uint32_t>& ends) {
  Form form;
  form.name = "5 chunks, events, words by another stream";
  uint32_t first = 0;
  for (uint32_t c = 0; c < ends.size(); ++c) {
    form.steps.push_back({0, Kind::kRows, first, ends[c]});
    form.steps.push_back({0, Kind::kRecord, c, 0});
    form.steps.push_back({1, Kind::kAwaitEvent, c, 0});
    form.steps.push_back({1, Kind::kTell, c, 0});
    first = ends[c];
  }
  form.steps.push_back({1, Kind::kMark, 0, 0});
  form.steps.push_back({0, Kind::kAwait, 0, 0});
  return form;
}

/// Two pieces of rows and the small copies, none of them, on the rows' stream or on another; one word at the end.
Form beside(std::string name, uint32_t small_stream, bool small) {
  Form form;
  form.name = std::move(name);
  form.small = small;
  form.steps.push_back({0, Kind::kRows, 0, 2});
  if (small && small_stream != 0) {
    form.steps.push_back({small_stream, Kind::kSmall, 0, 0});
    form.steps.push_back({small_stream, Kind::kMark, 0, 0});
  }
  form.steps.push_back({0, Kind::kRows, 2, kEighth});
  if (small && small_stream == 0) {
    form.steps.push_back({0, Kind::kSmall, 0, 0});
  } else if (small) {
    form.steps.push_back({0, Kind::kAwait, 0, 0});
  }
  form.steps.push_back({0, Kind::kTell, 0, 0});
  return form;
}

/// The small bytes before the last piece, as one copy and told, as if a kernel of the destination spread them.
Form spread_later() {
  Form form = beside("2 pieces, the small bytes as one copy between them, words", 0, false);
  form.small = true;
  const Step before[] = {{0, Kind::kSmallOnce, 0, 0}, {0, Kind::kTell, 1, 0}};
  form.steps.insert(form.steps.begin() + 1, std::begin(before), std::end(before));
  return form;
}

/// The last piece and the small copies in one call.
Form in_one_call(std::string name, uint32_t first) {
  Form form;
  form.name = std::move(name);
  form.small = true;
  if (first != 0) {
    form.steps.push_back({0, Kind::kRows, 0, first});
  }
  form.steps.push_back({0, Kind::kBatch, first, kEighth});
  form.steps.push_back({0, Kind::kTell, 0, 0});
  return form;
}

}  // namespace

std::vector<ChainForm> all_chain_forms(bool batches) {
  const std::vector<uint32_t> five = {2, 4, 6, 7, 8};
  const std::vector<uint32_t> ends = {1, 3, 5, 7, 8};
  const std::vector<uint32_t> eight = {1, 2, 3, 4, 5, 6, 7, 8};
  const Kind tell = Kind::kTell;
  const Kind both = Kind::kTellBoth;
  const Kind by_copy = Kind::kTellCopy;
  std::vector<Form> forms = {
      chunks("one copy", {8}, nullptr, 1),
      chunks("one copy, a word to the peer", {8}, &tell, 1),
      chunks("two halves on two streams at once", {4, 8}, nullptr, 2),
      chunks("5 chunks (2 2 2 1 1 eighths)", five, nullptr, 1),
      chunks("5 chunks, a word to the peer behind each", five, &tell, 1),
      chunks("5 chunks, words to the peer and to the own GPU behind each", five, &both, 1),
      chunks("5 chunks, a copy of 8 bytes to the peer behind each", five, &by_copy, 1),
      chunks("5 chunks, two streams in turn", five, nullptr, 2),
      chunks("5 chunks, a word to the peer behind each, two streams in turn", five, &tell, 2),
      told_in_order(five),
      told_aside(five),
      chunks("5 chunks (1 2 2 2 1), a word to the peer behind each", ends, &tell, 1),
      chunks("5 chunks (1 2 2 2 1), words, two streams in turn", ends, &tell, 2),
      chunks("3 chunks (4 3 1), a word to the peer behind each", {4, 7, 8}, &tell, 1),
      chunks("8 chunks, a word to the peer behind each", eight, &tell, 1),
      chunks("8 chunks, words, two streams in turn", eight, &tell, 2),
      beside("2 pieces (2 6), a word at the end", 0, false),
      beside("2 pieces, 4 small copies behind them, a word", 0, true),
      beside("2 pieces, 4 small copies on a second stream, a word", 1, true),
      spread_later(),
  };
  if (batches) {
    forms.push_back(in_one_call("1 piece and 4 small copies in one call, a word", 0));
    forms.push_back(in_one_call("2 pieces, the second and 4 small copies in one call, a word", 2));
  }
  return forms;
}

}  // namespace expertd::bench
