// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/table/rank_case.h"

#include <time.h>

#include <algorithm>
#include <array>
#include <stdexcept>

#include "tests/bench/bench_daemon.h"
#include "tests/bench/bench_figures.h"
#include "tests/bench/cuda_check.h"
#include "tests/bench/table/case_plans.h"
#include "tests/bench/table/half.h"
#include "tests/bench/table/loaded.h"

namespace expertd::bench {

namespace {

/// The operation's iterations between two turns of the others, and theirs in a turn: fewer beside GEMMs, where each may
/// take milliseconds.
constexpr uint32_t kBlock = 20;
constexpr uint32_t kTurn = 5;
constexpr uint32_t kTurnBusy = 1;
/// Of the clock's own time in a turn. A wait for a multiprocessor has a tail to be seen; of the other only the median
/// is used, and beside GEMMs without MPS it takes long.
constexpr uint32_t kTurnLocalWait = 5;
constexpr uint32_t kTurnOffset = 2;
/// Beside GEMMs, where an iteration takes milliseconds, shapes other than the main one have a part of the iterations.
constexpr uint32_t kBusyPart = 3;
/// Operations between events in all, beside those of the row's clock.
constexpr uint32_t kSwitches = 30;
/// Operations behind one gate where their time back to back is asked for: as many as a group has exchange pages. With
/// more the daemon's host would be in the time, because it enqueues the next one when a page is free.
constexpr uint32_t kQueued = 8;
/// The daemon has as many more to enqueue.
constexpr uint32_t kQueuedArm = kQueued / 2;
/// Graphs launched one behind the other where their time back to back is asked for.
constexpr uint32_t kReplays = 100;
/// Iterations that a row has, whatever they take: a p99 is of so many, and a p50 of those that are slow.
constexpr uint32_t kLeast = 100;
constexpr uint32_t kLeastSlow = 30;

/// User and system time of a process.
double cpu_ns_of(pid_t pid) {
  clockid_t clock{};
  timespec time{};
  if (clock_getcpuclockid(pid, &clock) != 0 || clock_gettime(clock, &time) != 0) {
    throw std::runtime_error("the CPU time of the daemon cannot be read; has it ended?");
  }
  return static_cast<double>(time.tv_sec) * 1e9 + static_cast<double>(time.tv_nsec);
}

/// Under MPS the operation is between kernels, because a busy client of one process would hold up the rest; else no
/// kernel of the client's may be near it, because its context would have to come back for that.
TimerClock clock_of(const ctl::BenchRank& rank, Start start) {
  auto info = EXPERTD_INIT(expertd_session_info_t);
  rank.check(expertd_session_info(rank.session(), &info), "session information");
  if (info.mps_active != 0) {
    return TimerClock::kKernels;
  }
  return start == Start::kAtOnce ? TimerClock::kEvents : TimerClock::kMemoryWords;
}

}  // namespace

RankCase::RankCase(RankGroup* group, ctl::BenchRank* rank, const TableCase& it)
    : group_(group),
      rank_(rank),
      it_(it),
      start_(it.operation == "layer" && !it.low_latency ? Start::kAtOnce : Start::kAtTheGate),
      clock_(clock_of(*rank, start_)),
      operation_(make()) {
  operation_->prepare(inputs_);
  if (clock_ == TimerClock::kMemoryWords) {
    // What is certain to run in the daemon's context: a layout runs in the caller's own. Every rank issues one.
    untimed_ = row_spec({"empty", "", it_.low_latency, it_.shape})
                   .make({group_->bench, it_.shape, rank_, "untimed barrier", 0});
    untimed_->prepare(inputs_);
  }
  warm_up();
  if (it_.is_whole() && !group_->has_floors(it_)) {
    add_floors();
    add_nccl();
  }
  if (it_.is_whole()) {
    add_queue();
    add_replays();
    add_compute();
    add_switch();
  }
  add_overlap();
  add_clock();
}

std::unique_ptr<ctl::BenchOperation> RankCase::make() {
  std::unique_ptr<ctl::BenchOperation> eager = make_eager();
  if (!it_.captured) {
    return eager;
  }
  const bool of_inputs = it_.operation == "combine" || layer_ != nullptr;
  auto replay = std::make_unique<ReplayOperation>(rank_, std::move(eager), of_inputs);
  replay_ = replay.get();
  return replay;
}

std::unique_ptr<ctl::BenchOperation> RankCase::make_eager() {
  const uint32_t flags = it_.half == "both" ? 0u : static_cast<uint32_t>(EXPERTD_ASYNC);
  const ctl::BenchCase bench{group_->bench, it_.shape, rank_, it_.name(), flags, it_.captured};
  if (it_.operation == "overlap") {
    std::unique_ptr<OverlapOperation> overlap = make_overlap(bench, tools().multiprocessors);
    overlap_ = overlap.get();
    return overlap;
  }
  if (it_.operation != "layer") {
    return row_spec(it_).make(bench);
  }
  cublas_ = Cublas::open();
  if (cublas_ == nullptr) {
    throw std::runtime_error("a layer needs cuBLAS, which cannot be loaded");
  }
  if (it_.captured) {
    cublas_->keep_workspace();
  }
  std::unique_ptr<LayerOperation> layer = make_layer(bench, it_.low_latency, *cublas_);
  layer_ = layer.get();
  return layer;
}

expertd_op_result_t RankCase::wait(expertd_event_t event) const {
  return replay_ != nullptr ? replay_->wait() : rank_->wait(event, it_.name());
}

/// Also what launches anything for the first time, which a parked stream would stop for ever.
void RankCase::warm_up() {
  for (uint32_t i = 0; i < group_->options.warmup; ++i) {
    group_->meeting->meet();
    expertd_event_t event{};
    operation_->issue(&event);
    if (it_.half == "receive") {
      rank_->check(expertd_event_stream_wait(event, rank_->stream()), "receive half");
    }
    wait(event);
    operation_->finish();
    if (untimed_ != nullptr) {
      untimed_->issue(&event);
      rank_->wait(event, "untimed barrier");
    }
  }
  check_cuda(cudaStreamSynchronize(tools().timer->stream()), "warming up");
}

/// The most of what any rank says.
uint64_t RankCase::agreed(uint64_t bytes) {
  group_->link_bytes[rank_->index()] = bytes;
  group_->meeting->meet();
  const uint64_t most = *std::max_element(group_->link_bytes.begin(), group_->link_bytes.end());
  group_->meeting->meet();
  return most;
}

void RankCase::add_floors() {
  const uint64_t bytes = agreed(operation_->bytes().remote);
  const ctl::BenchRouting routing(it_.shape, ctl::BenchInput(group_->bench.seed, inputs_));
  const uint64_t least_bytes = agreed(least_link_bytes(it_, routing, rank_->index()));
  if (it_.shape.ranks > 1 && bytes != 0) {
    add_floor(bytes, &RankFigures::floor_copy_engine_us, &RankFigures::floor_sm_us);
  }
  if (it_.shape.ranks > 1 && least_bytes != 0) {
    add_floor(least_bytes, &RankFigures::floor_least_copy_engine_us, &RankFigures::floor_least_sm_us);
  }
}

void RankCase::add_floor(uint64_t bytes, Times RankFigures::*copy_engine, Times RankFigures::*kernel) {
  const int next = group_->tools[(rank_->index() + 1) % it_.shape.ranks]->device;
  links_.push_back(std::make_unique<LinkCopy>(tools().device, next, bytes));
  const LinkCopy* const link = links_.back().get();
  cudaStream_t const stream = tools().timer->stream();
  const uint32_t blocks = tools().multiprocessors;
  const std::array<Contender, 2> forms = {{{copy_engine, [=] { link->enqueue_copy_engine(stream); }, {}},
                                           {kernel, [=] { link->enqueue_kernel(stream, blocks); }, {}}}};
  for (const Contender& form : forms) {
    link->prepare(group_->options.seed + rank_->index());
    group_->meeting->meet();
    form.enqueue();
    check_cuda(cudaStreamSynchronize(stream), "a copy over the link");
    if (link->wrong_words(group_->options.seed + rank_->index()) != 0) {
      throw std::runtime_error("a copy over the link has wrong words");
    }
    group_->meeting->meet();
    contenders_.push_back(form);
  }
}

void RankCase::add_nccl() {
  const ctl::BenchRouting routing(it_.shape, ctl::BenchInput(group_->bench.seed, inputs_));
  if (group_->nccl == nullptr || it_.shape.ranks < 2) {
    return;
  }
  for (ExchangePlan& plan : plans_of(it_, routing, rank_->index())) {
    exchanges_.push_back(std::make_unique<Exchange>(*group_->nccl, rank_->index(), std::move(plan)));
  }
  cudaStream_t const stream = tools().timer->stream();
  for (const auto& exchange : exchanges_) {
    exchange->prepare();
    group_->meeting->meet();
    exchange->enqueue(stream);
    check_cuda(cudaStreamSynchronize(stream), "the comparison with NCCL");
    if (const uint64_t wrong = exchange->wrong_rows(); wrong != 0) {
      throw std::runtime_error("the comparison with NCCL has " + std::to_string(wrong) + " wrong rows");
    }
  }
  if (!exchanges_.empty()) {
    contenders_.push_back({&RankFigures::nccl_us,
                           [=, this] {
                             for (const auto& exchange : exchanges_) {
                               exchange->enqueue(stream);
                               if (layer_ != nullptr && exchange == exchanges_.front()) {
                                 layer_->compute();
                               }
                             }
                           },
                           {},
                           1,
                           start_});
  }
}

void RankCase::add_queue() {
  if (it_.operation != "empty") {
    return;
  }
  queued_.resize(kQueued);
  contenders_.push_back({&RankFigures::queued_us,
                         [this] {
                           for (expertd_event_t& event : queued_) {
                             operation_->issue(&event);
                           }
                         },
                         [this] {
                           for (const expertd_event_t& event : queued_) {
                             rank_->wait(event, it_.name());
                           }
                         },
                         static_cast<double>(kQueued), start_, clock_});
}

/// At once, because a stream that is held takes fewer than all of them, and with an idle client alone, because beside
/// GEMMs they would take the time of a table.
void RankCase::add_replays() {
  if (replay_ == nullptr) {
    return;
  }
  Contender replays{&RankFigures::replay_us,
                    [this] {
                      for (uint32_t i = 0; i < kReplays; ++i) {
                        replay_->issue(&switched_);
                      }
                    },
                    [this] { wait(switched_); },
                    static_cast<double>(kReplays),
                    Start::kAtOnce,
                    clock_ == TimerClock::kKernels ? clock_ : TimerClock::kEvents};
  replays.idle_only = true;
  contenders_.push_back(replays);
}

void RankCase::add_compute() {
  if (layer_ != nullptr) {
    contenders_.push_back({&RankFigures::compute_us, [this] { layer_->compute(); }, {}, 1, start_});
  }
}

/// What a client sees that computes before and after: the GPU goes to the daemon's context and back for it.
void RankCase::add_switch() {
  if (clock_ != TimerClock::kMemoryWords) {
    return;
  }
  const uint32_t blocks = (group_->options.iterations + kBlock - 1) / kBlock;
  contenders_.push_back({&RankFigures::switch_us, [this] { operation_->issue(&switched_); },
                         [this] {
                           wait(switched_);
                           operation_->finish();
                         },
                         1, start_, TimerClock::kEvents, (kSwitches + blocks - 1) / blocks});
}

/// The computation of a micro-batch is made as long as its communication, and then everything takes turns.
void RankCase::add_overlap() {
  constexpr uint32_t kSamples = 5;
  constexpr uint32_t kCorrections = 4;
  if (overlap_ == nullptr) {
    return;
  }
  using Issue = void (OverlapOperation::*)(expertd_event_t*);
  const auto contender = [this](Times RankFigures::*times, Issue issue) {
    return Contender{
        times, [=, this] { (overlap_->*issue)(&switched_); }, [this] { rank_->wait(switched_, it_.name()); }, 1, start_,
        clock_};
  };
  const Contender computes{&RankFigures::compute_us, [this] { overlap_->compute(); }, {}, 1, start_};
  const auto median = [&](const Contender& it) {
    Times times;
    for (uint32_t i = 0; i < kSamples; ++i) {
      times.push_back(time_us(timing(it.clock, it.start, 1), it.enqueue));
      if (it.after) {
        it.after();
      }
    }
    return quantile_of(times, 0.5);
  };
  const Contender communicates = contender(&RankFigures::communication_us, &OverlapOperation::issue_communication);
  const double target_us = median(communicates);
  // As often on every rank, because they time together.
  for (uint32_t i = 0; i < kCorrections; ++i) {
    const double rounds = overlap_->rounds() * target_us / std::max(1.0, median(computes));
    overlap_->set_rounds(static_cast<uint32_t>(std::clamp(rounds, 1.0, 1e8)));
  }
  contenders_.push_back(communicates);
  contenders_.push_back(computes);
  contenders_.push_back(contender(&RankFigures::serial_us, &OverlapOperation::issue_serial));
  contenders_.push_back(contender(&RankFigures::single_us, &OverlapOperation::issue_single));
}

void RankCase::add_clock() {
  if (clock_ == TimerClock::kMemoryWords) {
    contenders_.push_back({&RankFigures::clock_offset_us, [] {}, {}, 1, Start::kAtTheGate, clock_, kTurnOffset});
  } else if (clock_ == TimerClock::kKernels) {
    contenders_.push_back({&RankFigures::local_wait_us, [] {}, {}, 1, Start::kAtTheGate, clock_, kTurnLocalWait});
  }
}

Timing RankCase::timing(TimerClock clock, Start start, double per_timing) {
  Timing timing{clock, start, per_timing > 1 ? group_->options.arm * kQueuedArm : group_->options.arm};
  if (clock == TimerClock::kMemoryWords) {
    timing.before = [this] { untimed_->issue(&untimed_event_); };
  }
  return timing;
}

double RankCase::time_us(const Timing& timing, const std::function<void()>& enqueue) {
  const double us = tools().timer->time_us(timing, enqueue);
  if (timing.clock == TimerClock::kMemoryWords) {
    rank_->wait(untimed_event_, "untimed barrier");
  }
  return us;
}

void RankCase::take_off_offset(RankFigures* figures) const {
  const double offset_us = quantile_of(figures->clock_offset_us, 0.5);
  for (Times* times : {&figures->times_us, &figures->serial_us, &figures->single_us, &figures->communication_us}) {
    for (double& us : *times) {
      us -= offset_us;
    }
  }
  for (double& us : figures->queued_us) {
    us -= offset_us / kQueued;
  }
}

void RankCase::measure(bool busy, RankFigures* figures) {
  group_->meeting->meet();
  const uint64_t begin_ns = now_ns();
  Loaded load(busy ? tools().load.get() : nullptr);
  figures->clock = clock_;
  iterate(busy, figures);
  load.stop();
  take_off_offset(figures);
  if (busy) {
    figures->client_slowdown = tools().load->slowdown(LoadPhase::kOperations);
    figures->client_slowdown_marks = tools().load->slowdown(LoadPhase::kMarks);
  }
  figures->bytes = operation_->bytes();
  figures->compute_sms = overlap_ == nullptr ? 0 : overlap_->compute_sms();
  figures->measure_s = static_cast<double>(now_ns() - begin_ns) * 1e-9;
}

uint32_t RankCase::iterations(bool busy) const {
  const uint32_t asked = group_->options.iterations;
  return busy && !it_.has_main_shape() ? std::max(2u, asked / kBusyPart) : asked;
}

/// The first inputs or the last ones, whichever are not in place: the operation has room for these.
void RankCase::renew_inputs() {
  inputs_ = inputs_ == 0 ? group_->options.iterations - 1 : 0;
  operation_->prepare(inputs_);
}

/// At the end of a block: the row had its time, and enough of the operation for what is told of it. All ranks say the
/// same.
bool RankCase::is_enough(bool busy, uint32_t done, uint64_t begin_ns) {
  const bool slow = busy || it_.operation == "layer";
  const double seconds = static_cast<double>(now_ns() - begin_ns) * 1e-9;
  const bool over = table_stopped.load(std::memory_order_relaxed) || seconds > group_->options.row_seconds;
  return agreed(over && done >= (slow ? kLeastSlow : kLeast) ? 1 : 0) != 0;
}

void RankCase::iterate(bool busy, RankFigures* figures) {
  uint32_t last = iterations(busy) - 1;
  const uint64_t row_begin_ns = now_ns();
  const auto phase = [&](LoadPhase to) {
    if (busy) {
      tools().load->set_phase(to);
    }
  };
  for (uint32_t i = 0; i <= last; ++i) {
    if (i == last) {
      phase(LoadPhase::kOther);
      const uint64_t begin_ns = now_ns();
      renew_inputs();
      figures->verify_s += static_cast<double>(now_ns() - begin_ns) * 1e-9;
    }
    // A busy client comes behind an idle one, which has just verified the inputs that it begins with.
    const bool verified = i == last || (i == 0 && !measured_);
    phase(verified ? LoadPhase::kOther : LoadPhase::kOperations);
    time_operation(figures, verified);
    if ((i + 1) % kBlock == 0 || i == last) {
      phase(LoadPhase::kOther);
      time_contenders(busy, figures);
      last = i + 1 < last && is_enough(busy, i + 1, row_begin_ns) ? i + 1 : last;
    }
  }
  measured_ = true;
}

void RankCase::time_operation(RankFigures* figures, bool verified) {
  const uint64_t poison_ns = now_ns();
  if (verified) {
    operation_->poison();
  }
  figures->verify_s += static_cast<double>(now_ns() - poison_ns) * 1e-9;
  const double cpu_ns = leads() ? cpu_ns_of(group_->daemon) : 0;
  const uint64_t begin_ns = now_ns();
  expertd_event_t event{};
  Timing timed = timing(clock_, start_, 1);
  std::function<void()> enqueue = [&] { operation_->issue(&event); };
  if (it_.half == "receive") {
    enqueue = time_receive_half(rank_, operation_.get(), &event, &timed);
  }
  figures->times_us.push_back(time_us(timed, enqueue));
  const expertd_op_result_t result = wait(event);
  figures->execution.add(result.executor, result.sms);
  if (leads() && !verified) {
    figures->daemon_cpu_ns += cpu_ns_of(group_->daemon) - cpu_ns;
    figures->wall_ns += static_cast<double>(now_ns() - begin_ns);
  }
  const uint64_t verify_ns = now_ns();
  if (verified) {
    operation_->verify(result);
  }
  figures->verify_s += static_cast<double>(now_ns() - verify_ns) * 1e-9;
  operation_->finish();
}

void RankCase::time_contenders(bool busy, RankFigures* figures) {
  const uint32_t turns = busy ? kTurnBusy : kTurn;
  const auto most = std::max_element(contenders_.begin(), contenders_.end(),
                                     [](const auto& left, const auto& right) { return left.turns < right.turns; });
  const uint32_t rounds = most == contenders_.end() ? 0 : std::max(turns, most->turns);
  for (uint32_t round = 0; round < rounds; ++round) {
    for (const Contender& it : contenders_) {
      if (round >= (it.turns == 0 ? turns : it.turns) || (busy && it.idle_only)) {
        continue;
      }
      if (busy) {
        const bool marks = it.times == &RankFigures::clock_offset_us || it.times == &RankFigures::local_wait_us;
        tools().load->set_phase(marks ? LoadPhase::kMarks : LoadPhase::kOther);
      }
      const double us = time_us(timing(it.clock, it.start, it.per_timing), it.enqueue);
      (figures->*it.times).push_back(us / it.per_timing);
      if (it.after) {
        it.after();
      }
    }
  }
}

}  // namespace expertd::bench
