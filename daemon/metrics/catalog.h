// SPDX-License-Identifier: Apache-2.0
// The one table of all metrics: name, type, labels, help. It drives the collector, the documentation and the lint test.
// Constants and pure functions, any thread. A metric that is not here does not exist.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "proto/abi/expertd_reason.h"
#include "proto/abi/ring_v1.h"

namespace expertd::metrics {

enum class MetricType { kCounter, kGauge, kHistogram };

// X(id, name, type, labels separated by commas, help)
#define EXPERTD_METRICS(X)                                                                                            \
  X(BuildInfo, "expertd_build_info", Gauge, "version,commit,cuda,ucx,abi", "Always 1; the labels say what runs.")     \
  X(State, "expertd_state", Gauge, "state", "1 for the state the daemon is in, 0 for the others.")                    \
  X(Ops, "expertd_ops_total", Counter, "op,gpu,result",                                                               \
    "Operations completed, replays of captured ones among them, by result.")                                          \
  X(OpFailed, "expertd_op_failed_total", Counter, "op,reason", "Operations that failed after admission, by Reason.")  \
  X(OpDuration, "expertd_op_duration_seconds", Histogram, "op,phase", "Time of successful operations in each phase.") \
  X(OpTotalDuration, "expertd_op_total_duration_seconds", Histogram, "op,gpu",                                        \
    "Submission to completion of successful dispatches and combines: op is ht or ll.")                                \
  X(OpTokens, "expertd_op_tokens_total", Counter, "op,gpu", "Tokens of successful operations.")                       \
  X(OpBytes, "expertd_op_bytes_total", Counter, "op,gpu,path",                                                        \
    "Bytes moved by successful operations: local stays on the device, remote goes to another of the node, "           \
    "fabric to another node.")                                                                                        \
  X(OpExecuted, "expertd_op_executed_total", Counter, "op,gpu,executor",                                              \
    "Successful operations, by what did their work.")                                                                 \
  X(OpSmSeconds, "expertd_op_sm_seconds_total", Counter, "op,gpu",                                                    \
    "Time from start to end of successful operations, times the multiprocessors that their largest kernel takes.")    \
  X(OpOvertakes, "expertd_op_overtakes_total", Counter, "gpu",                                                        \
    "Low-latency operations that ended before a high-throughput one of another session that was complete earlier.")   \
  X(OpRejected, "expertd_op_rejected_total", Counter, "gpu,reason",                                                   \
    "Operations refused, at admission or by their client's library, by Reason.")                                      \
  X(OpDeadlineExceeded, "expertd_op_deadline_exceeded_total", Counter, "op,missing",                                  \
    "Operations that reached their deadline, by what was missing.")                                                   \
  X(RingSlotsUsed, "expertd_ring_slots_used", Gauge, "gpu", "Most slots in use on one ring since the last scrape.")   \
  X(RingSlotsCapacity, "expertd_ring_slots_capacity", Gauge, "gpu", "Slots of one ring.")                             \
  X(RingFull, "expertd_ring_full_total", Counter, "gpu", "Looks of the loop that found a ring without a free slot.")  \
  X(DescriptorInvalid, "expertd_descriptor_invalid_total", Counter, "reason",                                         \
    "Ring descriptors that could not be understood, by Reason.")                                                      \
  X(Sessions, "expertd_sessions", Gauge, "", "Sessions attached.")                                                    \
  X(SessionsOpened, "expertd_sessions_opened_total", Counter, "", "Sessions attached since the start.")               \
  X(SessionsClosed, "expertd_sessions_closed_total", Counter, "cause", "Sessions ended, by cause.")                   \
  X(LeaseReapDuration, "expertd_lease_reap_duration_seconds", Histogram, "",                                          \
    "End of a session's lease to everything of it reclaimed.")                                                        \
  X(PoolBytes, "expertd_pool_bytes", Gauge, "gpu,state",                                                              \
    "Bytes of the device: used by the daemon, free below device.pool_max_bytes, registered by clients, quarantined.") \
  X(GpuContextBytes, "expertd_gpu_context_bytes", Gauge, "gpu",                                                       \
    "What the CUDA context took when the daemon started; NaN when that is not known.")                                \
  X(GpuContextLost, "expertd_gpu_context_lost_total", Counter, "gpu",                                                 \
    "GPU contexts lost; the process ends with 75 right after, so watch its restarts too.")                            \
  X(GpuMpsActive, "expertd_gpu_mps_active", Gauge, "gpu", "1 when an MPS server carries the daemon on this GPU.")     \
  X(GpuHealthy, "expertd_gpu_healthy", Gauge, "gpu", "1 while the device serves.")                                    \
  X(FabricBackendInfo, "expertd_fabric_backend_info", Gauge, "backend,transports",                                    \
    "1 for what carries groups over several nodes and the transports it may use; 0 while the fabric is off.")         \
  X(FabricPeers, "expertd_fabric_peers", Gauge, "state",                                                              \
    "Daemons of other nodes that this one is connected to, or lost.")                                                 \
  X(FabricPeerFailures, "expertd_fabric_peer_failures_total", Counter, "cause",                                       \
    "Daemons of other nodes lost, by cause.")                                                                         \
  X(FabricMessages, "expertd_fabric_messages_total", Counter, "lane,direction",                                       \
    "Messages of operations to and from other nodes.")                                                                \
  X(FabricBytes, "expertd_fabric_bytes_total", Counter, "lane,direction", "Bytes of these messages.")                 \
  X(FabricInflight, "expertd_fabric_inflight", Gauge, "lane", "Messages to other nodes whose sending has not ended.") \
  X(FabricDeferred, "expertd_fabric_deferred_total", Counter, "lane",                                                 \
    "Messages from other nodes that had to wait for a buffer.")                                                       \
  X(FabricDropped, "expertd_fabric_dropped_total", Counter, "cause", "Messages that were not taken, by cause.")       \
  X(FabricHeartbeatRtt, "expertd_fabric_heartbeat_rtt_seconds", Histogram, "",                                        \
    "Heartbeats to other nodes, there and back.")                                                                     \
  X(FabricMeshLatency, "expertd_fabric_mesh_latency_seconds", Gauge, "node,lane,device,quantile",                     \
    "One way to another node as last measured from here (expertctl mesh); device is empty where the lane has one.")   \
  X(FabricMeshBandwidth, "expertd_fabric_mesh_bytes_per_second", Gauge, "node,lane,device",                           \
    "Bandwidth to another node as last measured from here (expertctl mesh).")                                         \
  X(GroupsSpanning, "expertd_groups_spanning", Gauge, "", "Groups over several nodes that are open.")                 \
  X(RendezvousUp, "expertd_rendezvous_up", Gauge, "",                                                                 \
    "1 while the rendezvous of groups over several nodes is known and answers; 0 also where the fabric is off.")      \
  X(ThreadLoopLag, "expertd_thread_loop_lag_seconds", Gauge, "thread",                                                \
    "Longest turn of the thread's loop since the last scrape.")                                                       \
  X(WatchdogMissedBeats, "expertd_watchdog_missed_beats_total", Counter, "thread",                                    \
    "Watchdog intervals that passed without a sign of the thread.")                                                   \
  X(LogDropped, "expertd_log_dropped_total", Counter, "", "Log lines lost because the queue was full.")               \
  X(ConfigLastLoadSuccess, "expertd_config_last_load_success", Gauge, "",                                             \
    "1 when the configuration was read without error last time.")                                                     \
  X(DrainInProgress, "expertd_drain_in_progress", Gauge, "", "1 while the daemon drains.")                            \
  X(DrainRemainingSessions, "expertd_drain_remaining_sessions", Gauge, "", "Sessions that a drain still waits for.")  \
  X(ProcessCpu, "process_cpu_seconds_total", Counter, "", "User and system time of the process.")                     \
  X(ProcessResident, "process_resident_memory_bytes", Gauge, "", "Resident memory of the process.")                   \
  X(ProcessVirtual, "process_virtual_memory_bytes", Gauge, "", "Virtual memory of the process.")                      \
  X(ProcessOpenFds, "process_open_fds", Gauge, "", "Descriptors open.")                                               \
  X(ProcessMaxFds, "process_max_fds", Gauge, "", "Limit of open descriptors.")                                        \
  X(ProcessStartTime, "process_start_time_seconds", Gauge, "", "Start of the process, seconds since 1970.")

enum class Metric : size_t {
#define EXPERTD_METRIC_ENUM(id, name, type, labels, help) k##id,
  EXPERTD_METRICS(EXPERTD_METRIC_ENUM)
#undef EXPERTD_METRIC_ENUM
      kCount
};

struct MetricInfo {
  std::string_view name;
  MetricType type = MetricType::kGauge;
  std::string_view labels;  // separated by commas
  std::string_view help;
};

inline constexpr std::array<MetricInfo, static_cast<size_t>(Metric::kCount)> kCatalog = {{
#define EXPERTD_METRIC_ROW(id, name, type, labels, help) {name, MetricType::k##type, labels, help},
    EXPERTD_METRICS(EXPERTD_METRIC_ROW)
#undef EXPERTD_METRIC_ROW
}};

constexpr const MetricInfo& info_of(Metric metric) {
  return kCatalog[static_cast<size_t>(metric)];
}

/// Upper bounds of op_duration and op_total_duration: dense from 20 to 320 us, where decode lives.
inline constexpr std::array<uint64_t, 17> kOpBoundsNs = {5'000,   10'000,   15'000,    20'000,     30'000,     40'000,
                                                         60'000,  80'000,   120'000,   160'000,    240'000,    320'000,
                                                         640'000, 1280'000, 5'000'000, 20'000'000, 100'000'000};
/// Upper bounds of lease_reap_duration: the goal is 100 ms.
inline constexpr std::array<uint64_t, 11> kReapBoundsNs = {1'000'000,   2'000'000,     5'000'000,    10'000'000,
                                                           20'000'000,  50'000'000,    100'000'000,  200'000'000,
                                                           500'000'000, 1'000'000'000, 5'000'000'000};
/// Upper bounds of fabric_heartbeat_rtt.
inline constexpr std::array<uint64_t, 10> kRttBoundsNs = {20'000,    50'000,    100'000,    200'000,     500'000,
                                                          1'000'000, 5'000'000, 20'000'000, 100'000'000, 500'000'000};

/// The bounds of a histogram; empty for other types.
std::span<const uint64_t> bounds_of(Metric metric);

// Label values. Every one is from a closed list; `gpu` is "host" (all host devices together) or a device index.
inline constexpr std::array<std::string_view, EXPERTD_OP_COUNT> kOpNames = {
    "none", "barrier", "layout", "dispatch", "combine", "ll_dispatch", "ll_combine"};
enum class Phase : size_t { kQueue, kKernel, kFabric, kComplete, kTotal, kCount };
inline constexpr std::array<std::string_view, static_cast<size_t>(Phase::kCount)> kPhaseNames = {
    "queue", "kernel", "fabric", "complete", "total"};
inline constexpr std::array<std::string_view, 5> kMissingNames = {"none", "submission", "doorbell", "counts", "rows"};
inline constexpr std::array<std::string_view, 4> kExecutorNames = {"none", "host", "sm", "copy_engine"};
inline constexpr std::array<std::string_view, 4> kStateNames = {"starting", "ready", "degraded", "draining"};
enum class CloseCause : size_t { kBye, kEof, kLease, kKicked, kDrain, kAbi, kCount };
inline constexpr std::array<std::string_view, static_cast<size_t>(CloseCause::kCount)> kCloseCauseNames = {
    "bye", "eof", "lease", "kicked", "drain", "abi"};
inline constexpr std::array<std::string_view, 3> kPeerStateNames = {"connecting", "up", "lost"};
inline constexpr std::array<std::string_view, 6> kPeerFailureNames = {"transport", "silent", "never_answered",
                                                                      "garbage",   "left",   "disconnected"};
inline constexpr std::array<std::string_view, 7> kDropNames = {
    "malformed", "version", "unknown_node", "unknown_group", "epoch", "bad_field", "overrun"};
inline constexpr std::array<std::string_view, 2> kLaneNames = {"latency", "throughput"};
inline constexpr std::string_view kHostLabel = "host";

/// Reasons that an operation can end with have an index of their own, 1..; all others share the last, "OTHER".
constexpr bool is_op_reason(uint32_t number) {
  return (number >= 1 && number < 20) || (number >= 40 && number < 60) || number == EXPERTD_REASON_SYSTEM ||
         number == EXPERTD_REASON_CUDA || number == EXPERTD_REASON_UNSUPPORTED || number == EXPERTD_REASON_BAD_STATE;
}
inline constexpr size_t kReasonCount = [] {
  size_t count = 2;  // NONE and OTHER
#define EXPERTD_REASON_COUNT(name, number, code, retryable, sentence) count += is_op_reason(number) ? 1 : 0;
  EXPERTD_REASONS(EXPERTD_REASON_COUNT)
#undef EXPERTD_REASON_COUNT
  return count;
}();
inline constexpr size_t kReasonNumbers = 128;
struct ReasonTable {
  std::array<uint8_t, kReasonNumbers> index{};  // by number
  std::array<std::string_view, kReasonCount> name{};
};
inline constexpr ReasonTable kReasons = [] {
  ReasonTable table;
  table.index.fill(kReasonCount - 1);
  table.index[EXPERTD_REASON_NONE] = 0;
  table.name.front() = "NONE";
  table.name.back() = "OTHER";
  uint8_t next = 1;
#define EXPERTD_REASON_INDEX(reason_name, number, code, retryable, sentence) \
  if (is_op_reason(number)) {                                                \
    table.name[next] = #reason_name;                                         \
    table.index[number] = next++;                                            \
  }
  EXPERTD_REASONS(EXPERTD_REASON_INDEX)
#undef EXPERTD_REASON_INDEX
  return table;
}();
/// Any number is allowed.
constexpr size_t reason_index(uint32_t number) {
  return number < kReasonNumbers ? kReasons.index[number] : kReasonCount - 1;
}

/// The table of deploy/monitoring/metrics.md.
std::string metrics_markdown();

}  // namespace expertd::metrics
