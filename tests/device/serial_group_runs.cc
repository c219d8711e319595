// SPDX-License-Identifier: Apache-2.0
// The order of the kernels of an operation, as in daemon/device/cuda/chain.cc and capture_lane.cc, with the test's own
// words in the place of the stream's waits.
#include <string>

#include "tests/device/serial_group.h"

namespace expertd::device_test {

using namespace kernels::cuda;
using kernels::OpShape;

namespace {

constexpr uint32_t kWordOfDoorbell = 2;  // behind completion and result

bool is_active(uint64_t mask, uint32_t rank) {
  return ((mask >> rank) & 1) != 0;
}

bool is_dispatch(const OpShape& shape) {
  return shape.kind == OpKind::kDispatch || shape.kind == OpKind::kLlDispatch;
}

}  // namespace

/// The kernel that waits in the stream's place, whose word is there.
void SerialGroup::doorbell(Params* params) {
  params->after_doorbell = by_kernels_ ? 1 : 0;
  if (by_kernels_) {
    uint64_t* word = params->words.completion + kWordOfDoorbell;
    EXPECT_EQ(cudaSuccess, cudaMemcpy(word, &seq_, sizeof(seq_), cudaMemcpyHostToDevice));
    ran("await_doorbell", launch_await_doorbell(word, seq_, stream_));
  }
}

void SerialGroup::flags(uint32_t rank, bool moved) {
  Params& params = params_[rank];
  const uint64_t others = active_ & ~(uint64_t{1} << rank);
  params.after_flags = by_kernels_ && others != 0 ? 1 : 0;
  if (params.after_flags != 0) {
    const SyncPage* page = params.peers.pages[rank];
    ran("await_flags", launch_await_flags({moved ? page->moved : page->routed, others, group_op_}, stream_));
  }
}

template <typename Launch>
void SerialGroup::each(const char* what, const Launch& launch) {
  for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
    if (is_active(active_, rank)) {
      ran(what, launch(params_[rank]));
    }
  }
}

void SerialGroup::run_generic() {
  const OpShape& shape = params_[0].op.shape;
  const bool dispatch = is_dispatch(shape);
  const bool relayed = which_ == Kernels::kRelay;
  const auto each_of = [this](const char* what, cudaError_t (*launch)(const Params&, cudaStream_t)) {
    each(what, [&](const Params& params) { return launch(params, stream_); });
  };
  const auto signal = [this](const char* what, SignalStep step) {
    each(what, [&](const Params& params) { return launch_signal(params, step, stream_); });
  };
  if (dispatch && shape.cached == 0) {
    each_of("route_count", launch_route_count);
    each_of("route_scan", launch_route_scan);
    each_of("route_number", launch_route_number);
  }
  if (relayed && !dispatch) {
    each_of("relay_plan", launch_relay_plan);
  }
  if (relayed) {
    each_of("relay_publish", launch_relay_publish);
  }
  signal("signal routed", SignalStep::kRouted);
  each_of("plan", launch_plan);
  each_of(dispatch ? "dispatch_move" : "combine_pull", dispatch ? launch_dispatch_move : launch_combine_pull);
  if (relayed && dispatch) {
    each_of("relay_move", launch_relay_move);
  }
  signal("signal moved", SignalStep::kMoved);
  each_of("finish", launch_finish);
}

void SerialGroup::run_link(Heard heard) {
  const bool dispatch = is_dispatch(params_[0].op.shape);
  const auto launch = dispatch ? launch_link_dispatch : launch_link_combine;
  const char* what = dispatch ? "link_dispatch" : "link_combine";
  for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
    if (!is_active(active_, rank)) {
      continue;
    }
    if (heard != Heard::kAllLate) {
      hear(rank, heard != Heard::kLastLate);
    }
    doorbell(&params_[rank]);
    ran(what, launch(params_[rank], Entry::kWaits, stream_));
    hear(rank, heard != Heard::kAllLate);
    ran(what, launch(params_[rank], Entry::kBehindWait, stream_));
    hear(rank, true);
    ran("finish", launch_finish(params_[rank], stream_));
  }
}

ArmParams SerialGroup::arm_of(uint32_t rank) {
  const SerialRank& own = *ranks_[rank];
  ArmParams arm;
  arm.words = params_[rank].words;
  arm.words.seq = 1;
  arm.entries = own.entry.at<PartParams>();
  arm.doorbell = own.words.at<uint64_t>(kWordOfDoorbell * sizeof(uint64_t));
  arm.lane = own.lane.at<LaneState>();
  arm.generation = 1;
  arm.experts = shape_.experts;
  arm.multiprocessors = kSerialMultiprocessors;
  return arm;
}

void SerialGroup::launch_ll(uint32_t rank, LowLatencyEntry place) {
  Params& params = params_[rank];
  const bool dispatch = is_dispatch(params.op.shape);
  const bool first = place == LowLatencyEntry::kWaits;
  if (dispatch && place == LowLatencyEntry::kBehindRouted && which_ != Kernels::kCaptured) {
    return;  // it has one exchange
  }
  if (which_ == Kernels::kCaptured) {
    ArmParams arm = arm_of(rank);
    if (first) {
      const uint64_t names_the_entry = 1;
      EXPECT_EQ(cudaSuccess, cudaMemcpy(arm.doorbell, &names_the_entry, sizeof(uint64_t), cudaMemcpyHostToDevice));
      arm.after_wait = by_kernels_ ? 1 : 0;
    }
    if (arm.after_wait != 0) {
      ran("await_arm", launch_await_arm(arm, stream_));
    }
    ran("link_ll_captured", launch_link_ll_captured(arm, place, stream_));
    return;
  }
  if (first) {
    doorbell(&params);
  } else {
    flags(rank, place == LowLatencyEntry::kBehindMoved);
  }
  if (!dispatch) {
    ran("link_ll_combine", launch_link_ll_combine(params, place, stream_));
  } else {
    ran("link_ll_dispatch", launch_link_ll_dispatch(params, first ? Entry::kWaits : Entry::kBehindWait, stream_));
  }
}

/// Rows and sums of the others come by their kernels, so for a rank to have them at once all have sent them before: in
/// a part that is left there. A dispatch sends before it waits. Of a combine the first kernel hears nothing, so that
/// all its blocks leave the sums to the second, which waits for nothing: a block that heard may still be too late, for
/// the own word too, where the tool makes kernels slow, and what it left would be missing.
void SerialGroup::rehearse() {
  for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
    if (!is_active(active_, rank)) {
      continue;
    }
    launch_ll(rank, LowLatencyEntry::kWaits);
    if (!is_dispatch(params_[rank].op.shape)) {
      hear(rank, false);
      launch_ll(rank, LowLatencyEntry::kBehindRouted);
    }
    EXPECT_EQ(group_op_, ranks_[rank]->sent_page.get<SyncPage>(1)[0].moved[rank])
        << "rank " << rank << " has not sent all that the others are to have at once";
  }
  ++part_;
  ++group_op_;
  for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
    params_[rank].words.part = part_;
    params_[rank].words.group_op = group_op_;
    ranks_[rank]->facts.put(std::vector<PartFacts>(1));
  }
}

void SerialGroup::run_low_latency(Heard heard) {
  const bool alone = (active_ & (active_ - 1)) == 0;
  const bool dispatch = is_dispatch(params_[0].op.shape);
  for (uint32_t rank = 0; which_ == Kernels::kCaptured && rank < shape_.ranks; ++rank) {
    ranks_[rank]->entry.put(std::vector<PartParams>{params_[rank]});
  }
  if (heard == Heard::kAtOnce && !alone) {
    rehearse();
  }
  // Of a dispatch there is one exchange, and nothing to be heard before.
  const bool first_late = heard == Heard::kAllLate || (dispatch && heard == Heard::kLastLate);
  const auto each_rank = [this](const auto& does) {
    for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
      if (is_active(active_, rank)) {
        does(rank);
      }
    }
  };
  each_rank([&](uint32_t rank) {
    if (!first_late) {
      hear(rank, heard != Heard::kLastLate);
    }
    launch_ll(rank, LowLatencyEntry::kWaits);
  });
  // As an arm's host does. How much is left is also a matter of how slow the kernel is made.
  const auto was_left = [this](uint32_t rank) { return which_ != Kernels::kCaptured || facts(rank).left == part_; };
  each_rank([&](uint32_t rank) {
    hear(rank, heard == Heard::kAtOnce || aborted_);
    if (was_left(rank)) {
      launch_ll(rank, LowLatencyEntry::kBehindRouted);
    }
  });
  each_rank([&](uint32_t rank) {
    hear(rank, true);
    if (was_left(rank)) {
      launch_ll(rank, LowLatencyEntry::kBehindMoved);
    }
  });
}

void SerialGroup::run(const CaseStep& step, Heard heard) {
  begin(step.made.shape.active_ranks.low());
  fill(step);
  aborted_ = heard == Heard::kAborted;
  uint32_t first = 0;
  while (!is_active(active_, first)) {
    ++first;
  }
  for (uint32_t rank = 0; rank < shape_.ranks && aborted_; ++rank) {
    abort_part(rank);
  }
  if (which_ == Kernels::kLinked && serves_link(params_[first])) {
    run_link(heard);
  } else if (params_[first].low_latency.staging[first] != nullptr) {
    run_low_latency(heard);
  } else {
    run_generic();
  }
  for (uint32_t rank = 0; rank < shape_.ranks && !aborted_; ++rank) {
    if (is_active(active_, rank)) {
      SCOPED_TRACE("rank " + std::to_string(rank));
      expect_told(step, rank);
    }
  }
  placed_.give_back(!aborted_);
}

void SerialGroup::run_barrier(uint64_t active_ranks, Heard heard) {
  begin(active_ranks);
  aborted_ = heard == Heard::kAborted;
  for (uint32_t rank = 0; rank < shape_.ranks; ++rank) {
    if (!is_active(active_, rank)) {
      continue;
    }
    OpParams op;
    op.shape = shape_;
    op.shape.kind = OpKind::kBarrier;
    op.shape.rank = rank;
    op.shape.active_ranks = base::RankSet(active_ranks);
    params_[rank] = params_of(rank, op);
    if (aborted_) {
      abort_part(rank);
    }
    if (heard == Heard::kAtOnce || aborted_) {
      hear(rank, true);
    }
    doorbell(&params_[rank]);
    ran("meet", launch_meet(params_[rank], stream_));
    if (active_ != uint64_t{1} << rank) {
      hear(rank, true);
      ran("finish", launch_finish(params_[rank], stream_));
    }
  }
}

void SerialGroup::ring_captured(uint64_t rung, bool by_kernel) {
  begin(1);
  params_[0] = params_of(0, {});
  ArmParams arm = arm_of(0);
  arm.after_wait = by_kernel ? 1 : 0;
  EXPECT_EQ(cudaSuccess, cudaMemcpy(arm.doorbell, &rung, sizeof(rung), cudaMemcpyHostToDevice));
  if (by_kernel) {
    ran("await_arm", launch_await_arm(arm, stream_));
  }
  ran("link_ll_captured", launch_link_ll_captured(arm, LowLatencyEntry::kWaits, stream_));
}

}  // namespace expertd::device_test
