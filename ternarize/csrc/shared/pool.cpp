#include "shared/pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#endif

namespace ternarize {
namespace {

using Clock = std::chrono::steady_clock;

// Longer than from one product of a layer to the next, shorter than anyone who wants the core minds.
constexpr std::chrono::microseconds kSpin{60};
constexpr int kMostHelpers = 255;

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#endif
}

// Calls done() until it is true or kSpin is over; returns whether it was true.
template <class Done>
bool spin(Done done) {
  const Clock::time_point end = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      relax();
    }
  } while (Clock::now() < end);
  return false;
}

// One job at a time. `job_` holds its number, how many tasks it has and which is the next, in 32, 16
// and 16 bits; a task is taken by adding one. A helper that comes late, when the job is over and the
// fields below belong to another one, finds no task left or another number, and takes nothing.
class Pool {
 public:
  void run(int helpers, uint64_t tasks, void (*work)(void*, int64_t, int), void* context) {
    start(helpers);
    work_.store(work, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    helpers_.store(helpers, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    const uint32_t number = number_of(job_.load(std::memory_order_relaxed)) + 1;
    job_.store(static_cast<uint64_t>(number) << 32 | tasks << 16);
    if (asleep_.load() > 0) {
      { std::lock_guard<std::mutex> lock(sleep_); }  // whoever is about to sleep does so first
      wake_.notify_all();
    }
    take_tasks(number, 0);
    const auto all_done = [&] { return done_.load(std::memory_order_acquire) == tasks; };
    while (!spin(all_done)) std::this_thread::yield();  // to a helper that lost its core
  }

  std::mutex user;  // held by the thread that calls run

 private:
  static uint32_t number_of(uint64_t job) { return static_cast<uint32_t>(job >> 32); }

  void start(int helpers) {
    for (; started_ < helpers; ++started_) {
      try {
        std::thread([this, index = started_, seen = number_of(job_.load())] {
          help(index, seen);
        }).detach();
      } catch (const std::exception&) {  // no more threads, or memory for one: those there do it
        return;
      }
    }
  }

  void take_tasks(uint32_t number, int worker) {
    uint64_t job = job_.load(std::memory_order_acquire);
    for (;;) {
      const uint64_t tasks = job >> 16 & 0xffff, task = job & 0xffff;
      if (number_of(job) != number || task == tasks) return;
      // They belong to this job, or it is over by now and the exchange fails.
      const auto work = work_.load(std::memory_order_relaxed);
      void* const context = context_.load(std::memory_order_relaxed);
      if (!job_.compare_exchange_weak(job, job + 1, std::memory_order_acq_rel,
                                      std::memory_order_acquire))
        continue;
      work(context, static_cast<int64_t>(task), worker);
      done_.fetch_add(1, std::memory_order_release);
      job = job_.load(std::memory_order_acquire);
    }
  }

  [[noreturn]] void help(int index, uint32_t seen) {
    for (;;) {
      const auto more = [&] { return number_of(job_.load(std::memory_order_acquire)) != seen; };
      if (!spin(more)) {
        std::unique_lock<std::mutex> lock(sleep_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [&] { return number_of(job_.load()) != seen; });
        asleep_.fetch_sub(1);
      }
      seen = number_of(job_.load(std::memory_order_acquire));
      if (index < helpers_.load(std::memory_order_relaxed)) take_tasks(seen, index + 1);
    }
  }

  std::atomic<uint64_t> job_{0};
  std::atomic<uint64_t> done_{0};
  std::atomic<int> helpers_{0}, asleep_{0};
  std::atomic<void (*)(void*, int64_t, int)> work_{nullptr};
  std::atomic<void*> context_{nullptr};
  int started_ = 0;
  std::mutex sleep_;
  std::condition_variable wake_;
};

std::atomic<Pool*> current{nullptr};
std::atomic<Parallel> openmp{nullptr};

// Called by each thread of a team.
struct Team {
  void (*work)(void*, int64_t, int);
  void* context;
  int64_t tasks;
  std::atomic<int64_t> next{0};
  std::atomic<int> workers{0};

  static void join(void* data) {
    Team& team = *static_cast<Team*>(data);
    const int worker = team.workers.fetch_add(1, std::memory_order_relaxed);
    for (;;) {
      const int64_t task = team.next.fetch_add(1, std::memory_order_relaxed);
      if (task >= team.tasks) return;
      team.work(team.context, task, worker);
    }
  }
};

// In the child of a fork neither has threads any longer. OpenMP would wait for its own for ever, so
// the child has a new pool.
void forget_threads() {
  current.store(nullptr);
  openmp.store(nullptr);
}

void when_forked() {
#ifndef _WIN32
  static const int registered = pthread_atfork(nullptr, nullptr, forget_threads);
  static_cast<void>(registered);
#endif
}

// Never freed: its threads use it until the process ends.
Pool& pool() {
  Pool* found = current.load();
  if (!found) {
    Pool* fresh = new Pool;
    if (current.compare_exchange_strong(found, fresh)) {
      found = fresh;
      when_forked();
    } else {
      delete fresh;
    }
  }
  return *found;
}

}  // namespace

void use_openmp(Parallel parallel) {
  when_forked();
  openmp.store(parallel);
}

void run_tasks(int threads, int64_t tasks, void (*work)(void*, int64_t, int), void* context) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads > kMostHelpers + 1) threads = kMostHelpers + 1;
  const Parallel parallel = openmp.load(std::memory_order_relaxed);
  if (threads > 1 && parallel) {
    Team team{work, context, tasks};
    return parallel(Team::join, &team, static_cast<unsigned>(threads), 0);
  }
  if (threads > 1 && tasks <= kMostTasks) {
    Pool& shared = pool();
    std::unique_lock<std::mutex> alone(shared.user, std::try_to_lock);
    if (alone) return shared.run(threads - 1, static_cast<uint64_t>(tasks), work, context);
  }
  for (int64_t task = 0; task < tasks; ++task) work(context, task, 0);
}

}  // namespace ternarize
