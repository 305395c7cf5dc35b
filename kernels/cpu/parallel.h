// Threads. The only place with OpenMP: a function runs once for each worker, and workers take tasks from a counter.
// Which worker does a task never changes a bit of the result; that is the callers' duty. Without OpenMP the workers run
// one after another, so they must not wait for each other.
#pragma once
#include <atomic>
#include <cstddef>

// OpenMP's idle threads spin for milliseconds by default. On a machine that does other work as well they take the processor
// from the thread they wait for, and a step becomes several times slower (dev/log.md). The runtime reads its setting before
// main, so the program starts itself once more with OMP_WAIT_POLICY=passive, unless the user has set a policy. Returns when
// nothing is to be done, or when starting again fails.
void wait_passively(char** argv);

// fn(worker) for worker = 0 .. threads - 1.
template <class Fn>
void parallel(int threads, const Fn& fn) {
    if (threads <= 1) {
        fn(0);
        return;
    }
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int worker = 0; worker < threads; worker++) {
        fn(worker);
    }
}

// fn(task, worker) for task = 0 .. tasks - 1, each taken by the next free worker.
template <class Fn>
void parallel_tasks(int threads, size_t tasks, const Fn& fn) {
    if (tasks < size_t(threads)) {
        threads = int(tasks);
    }
    std::atomic<size_t> next{0};
    parallel(threads, [&](int worker) {
        for (size_t task = next++; task < tasks; task = next++) {
            fn(task, worker);
        }
    });
}

// fn(begin, end, worker) for consecutive ranges that cover 0 .. n, one a worker; only the last is smaller than grain.
template <class Fn>
void parallel_ranges(int threads, size_t n, size_t grain, const Fn& fn) {
    size_t each = (n + size_t(threads) - 1) / size_t(threads);
    each = each < grain ? grain : each;
    parallel_tasks(threads, (n + each - 1) / each, [&](size_t task, int worker) {
        size_t begin = task * each;
        fn(begin, n - begin < each ? n : begin + each, worker);
    });
}
