// A thread pool for operations that last no longer than waking a thread. A decoding step has about two hundred of them.
#pragma once

#include <cstdint>
#include <functional>

namespace arcmerge {

using Range = std::function<void(std::int64_t first, std::int64_t last)>;

// Calls body(first, last) on ranges that together are [0, count), on the calling thread and the threads of the pool,
// and returns when all have ended. The length of every range except the last is a multiple of `grain`.
//
// The division into ranges depends on the speed of the threads, so a result must not depend on it. If a body throws,
// ranges may be left undone, and the first exception is rethrown here. A body must not call `parallel`. Calls from
// several threads wait for one another.
void parallel(std::int64_t count, std::int64_t grain, const Range& body);

}  // namespace arcmerge
