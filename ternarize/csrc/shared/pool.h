// Threads that wait for work, for products that last tens of microseconds: too short to start threads
// for. They are those of torch where it has them (`use_openmp`): its own look for work for a while
// after each operator, so that any others would share the cores with them. Else they are a pool here.
#pragma once

#include <cstdint>

namespace ternarize {

// Calls work(context, task, worker) once for each task in [0, tasks), on the calling thread and up to
// threads - 1 others, and returns when all calls have returned. Tasks are handed out in order to
// whoever is free, so a result must not depend on who does a task. Each thread has its own number
// `worker` in [0, threads), for memory that it uses alone.
//
// Those of the pool look for more work for kSpin after the last, then sleep. They are started when they
// are first wanted, and in the child of a fork, which does not use OpenMP. Where two threads call this
// at the same time, the pool serves the first, and the second does its tasks alone; so does one with
// more than kMostTasks of them. `work` must not throw or call this function.
constexpr int64_t kMostTasks = 0xffff;

// The function with which compilers start a parallel region in an OpenMP runtime (libgomp's ABI): it
// calls fn(data) on `threads` threads at most and returns when all have returned.
using Parallel = void (*)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);

// From now on tasks run in regions that `parallel` starts; null: in the pool here.
void use_openmp(Parallel parallel);

void run_tasks(int threads, int64_t tasks, void (*work)(void* context, int64_t task, int worker),
               void* context);

template <class Work>
void run_tasks(int threads, int64_t tasks, Work work) {
  run_tasks(
      threads, tasks,
      [](void* context, int64_t task, int worker) {
        (*static_cast<Work*>(context))(task, worker);
      },
      &work);
}

}  // namespace ternarize
