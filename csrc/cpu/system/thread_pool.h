// Threads of our own, for operations that last as long as waking a thread: a decode step makes about two hundred.
#pragma once

#include <cstdint>
#include <functional>

namespace arcmerge {

using Range = std::function<void(std::int64_t first, std::int64_t last)>;

// Calls body on ranges that together are [0, count), each but the last a multiple of `grain` long, on the calling
// thread and on those of the pool; returns when all are done. Which thread gets which range depends on their speed, so
// a result must not depend on where a range ends. What a body throws is thrown here, once, and leaves ranges undone.
// A body may not call it; callers on several threads wait for one another.
void parallel(std::int64_t count, std::int64_t grain, const Range& body);

}  // namespace arcmerge
