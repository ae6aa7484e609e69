// Threads for callers without a pool of their own, such as the torch operator.
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "sparse_linear.h"

// One job at a time; callers that meet wait for each other. Workers sleep between jobs.
struct zs_pool {
  std::vector<std::thread> workers;
  std::mutex turn;  // held by the caller whose job runs
  std::mutex state;
  std::condition_variable wake, done;
  bool stop = false;
  uint64_t job = 0;  // counts jobs; workers compare it with the last one they saw
  size_t busy = 0;
  void (*task)(void*, size_t) = nullptr;
  void* argument = nullptr;
  size_t count = 0;
  std::atomic<size_t> next{0};

  void work() {
    for (size_t i = next++; i < count; i = next++) task(argument, i);
  }

  void loop() {
    uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(state);
        wake.wait(lock, [&] { return stop || job != seen; });
        if (stop) return;
        seen = job;
      }
      work();
      std::lock_guard<std::mutex> lock(state);
      if (--busy == 0) done.notify_one();
    }
  }
};

extern "C" {

zs_pool* zs_pool_create(int32_t threads) {
  zs_pool* pool = new (std::nothrow) zs_pool;
  if (!pool) return nullptr;
  try {
    for (int32_t i = 1; i < threads; i++) pool->workers.emplace_back([pool] { pool->loop(); });
  } catch (const std::system_error&) {
    // Fewer threads than asked for still do the work.
  }
  return pool;
}

void zs_pool_destroy(zs_pool* pool) {
  if (!pool) return;
  {
    std::lock_guard<std::mutex> lock(pool->state);
    pool->stop = true;
  }
  pool->wake.notify_all();
  for (std::thread& worker : pool->workers) worker.join();
  delete pool;
}

void zs_pool_run(void* context, void (*task)(void*, size_t), size_t count, void* argument) {
  zs_pool* pool = (zs_pool*)context;
  std::lock_guard<std::mutex> turn(pool->turn);
  {
    std::lock_guard<std::mutex> lock(pool->state);
    pool->task = task;
    pool->argument = argument;
    pool->count = count;
    pool->next = 0;
    pool->busy = pool->workers.size();
    pool->job++;
  }
  pool->wake.notify_all();
  pool->work();
  std::unique_lock<std::mutex> lock(pool->state);
  pool->done.wait(lock, [&] { return pool->busy == 0; });
}

}  // extern "C"
