// The level in force, and the ops that read and set it.
#include "dispatch.h"

#if SEQMODELS_LAUNCHERS

#include <atomic>
#include <cstdlib>
#include <string>

#include "stable.h"

namespace seqmodels {
namespace {

const char* const kNames[] = {"default", "avx2", "avx512"};

Capability best_of_machine() {
#if SEQMODELS_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma")) {
    return Capability::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Capability::avx2;
#endif
  return Capability::plain;
}

Capability parse(const std::string& name) {
  for (int level = 0; level < 3; ++level) {
    if (name == kNames[level]) {
      STD_TORCH_CHECK(level <= static_cast<int>(best_of_machine()), "CPU capability '", name,
                      "' was asked for, but this machine has at most '",
                      kNames[static_cast<int>(best_of_machine())], "'");
      return static_cast<Capability>(level);
    }
  }
  STD_TORCH_CHECK(false, "unknown CPU capability '", name, "'; expected default, avx2 or avx512");
}

Capability initial() {
  const char* requested = std::getenv("SEQMODELS_CPU_CAPABILITY");
  return requested == nullptr || *requested == '\0' ? best_of_machine() : parse(requested);
}

std::atomic<int>& current() {
  static std::atomic<int> level{static_cast<int>(initial())};
  return level;
}

std::string capability_name() { return kNames[current().load(std::memory_order_relaxed)]; }

// An empty name returns to the machine's best.
void set_capability(std::string name) {
  current().store(static_cast<int>(name.empty() ? best_of_machine() : parse(name)), std::memory_order_relaxed);
}

}  // namespace

Capability capability() { return static_cast<Capability>(current().load(std::memory_order_relaxed)); }

}  // namespace seqmodels

// This file defines the namespace; every other file adds to it with STABLE_TORCH_LIBRARY_FRAGMENT.
STABLE_TORCH_LIBRARY(seqmodels_cpu, m) {
  m.def("capability() -> str");
  m.def("set_capability(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(seqmodels_cpu, CompositeExplicitAutograd, m) {
  m.impl("capability", TORCH_BOX(&seqmodels::capability_name));
  m.impl("set_capability", TORCH_BOX(&seqmodels::set_capability));
}

#endif  // SEQMODELS_LAUNCHERS
