// Streams and events. As a rule work is done when it is given to a stream. With SIMT_STREAMS=queues a stream is a
// queue: its work is done when the host waits for something, one piece after another from the heads of random queues,
// as the seed has it, as far as events allow. Then work that should have waited for an event of another stream, and
// does not, sooner or later comes too early, and a host that reads without waiting reads old values.
//
//   stream 1   | kernel | record e | kernel |          <- the host waits for this one
//   stream 2   | wait e | kernel |                     any of it may have happened then, in any order that respects e
//
// The stream nullptr has no queue: its work is done at once, after that of the streams that were created as blocking.
#pragma once
#include <chrono>
#include <deque>
#include <functional>

#include "dev/simt/block.h"

struct CUevent_st {
    bool timed;
    uint64_t recorded, done;  // calls of cudaEventRecord, and those whose turn has come
    std::chrono::steady_clock::time_point when;
};
using cudaEvent_t = CUevent_st*;

namespace simt {

struct Work {
    std::function<void()> run;
    CUevent_st* event;  // to wait for; nullptr: none
    uint64_t record;    // which record of it
};

}  // namespace simt

struct CUstream_st {
    bool blocking;
    std::deque<simt::Work> queue;
};
using cudaStream_t = CUstream_st*;

namespace simt {

inline uint64_t schedule_seed() {
    const char* text = getenv("SIMT_SEED");
    return text ? strtoull(text, nullptr, 10) : 1;
}
inline uint64_t mix(uint64_t x) {  // the finaliser of splitmix64
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

inline std::vector<CUstream_st*>& streams() {
    static std::vector<CUstream_st*>* all = new std::vector<CUstream_st*>;  // outlives every exit function
    return *all;
}

inline void check_stream(const CUstream_st* s) {
    for (const CUstream_st* other : streams()) {
        if (s == other) {
            return;
        }
    }
    if (s) {
        fault("stream %p does not exist (any more)", static_cast<const void*>(s));
    }
}

// Does a piece of work of some stream; there is one.
inline void streams_step() {
    static uint64_t steps = 0, seed = 0;
    steps = seed == schedule_seed() ? steps + 1 : 1;  // a new seed gives its schedule whatever ran before
    seed = schedule_seed();
    const uint64_t random = mix(seed * 0x9e3779b97f4a7c15ull + steps);
    const std::vector<CUstream_st*>& all = streams();
    for (size_t i = 0; i < all.size(); i++) {
        std::deque<Work>& queue = all[(random + i) % all.size()]->queue;
        if (!queue.empty() && (!queue.front().event || queue.front().event->done >= queue.front().record)) {
            const Work work = queue.front();
            queue.pop_front();
            if (work.run) {
                work.run();
            }
            return;
        }
    }
    fault("streams wait for each other");
}

inline void stream_finish(CUstream_st* s) {
    while (!s->queue.empty()) {
        streams_step();
    }
}
inline void streams_finish(bool blocking_only) {
    for (CUstream_st* s : streams()) {
        if (s->blocking || !blocking_only) {
            stream_finish(s);
        }
    }
}
inline void event_finish(const CUevent_st& e) {
    while (e.done < e.recorded) {
        streams_step();
    }
}

inline void enqueue(CUstream_st* s, const Work& work) {
    check_stream(s);
    const char* text = getenv("SIMT_STREAMS");
    if (!s) {
        streams_finish(true);
        if (work.event) {
            event_finish(*work.event);
        }
        if (work.run) {
            work.run();
        }
        return;
    }
    s->queue.push_back(work);
    if (!text || strcmp(text, "queues") != 0) {
        stream_finish(s);
    }
}
inline void enqueue(CUstream_st* s, const std::function<void()>& run) {
    enqueue(s, Work{run, nullptr, 0});
}

}  // namespace simt
