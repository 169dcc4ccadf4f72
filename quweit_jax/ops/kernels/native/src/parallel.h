// Work shared with XLA's pool of threads. The caller works too and waits only for pieces that were
// begun, so that a pool whose threads are all busy (or waiting, too) holds nothing up.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace quweit {

template <typename Work>
class Shared {
 public:
  Shared(size_t pieces, Work work) : pieces_(pieces), work_(work) {}

  // Takes pieces until none is left.
  void Run() {
    for (size_t piece; (piece = next_.fetch_add(1)) < pieces_;) {
      work_(piece);
      if (done_.fetch_add(1) + 1 == pieces_) {
        std::lock_guard<std::mutex> lock(mutex_);
        finished_.notify_all();
      }
    }
  }

  void Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [this] { return done_.load() == pieces_; });
  }

 private:
  const size_t pieces_;
  const Work work_;
  std::atomic<size_t> next_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable finished_;
};

inline size_t Threads(xla::ffi::ThreadPool& pool) {
  return static_cast<size_t>(std::max<int64_t>(1, pool.num_threads()));
}

// Calls work(0) to work(pieces - 1), by several threads where there are more pieces than one.
template <typename Work>
void InParallel(xla::ffi::ThreadPool& pool, size_t pieces, Work work) {
  const size_t helpers = std::min(Threads(pool), pieces) - (pieces > 0);
  if (helpers == 0) {
    for (size_t piece = 0; piece < pieces; ++piece) work(piece);
    return;
  }
  auto shared = std::make_shared<Shared<Work>>(pieces, work);
  for (size_t i = 0; i < helpers; ++i) pool.Schedule([shared] { shared->Run(); });
  shared->Run();
  shared->Wait();
}

// Where part i of n equal parts of a length begins, in whole steps.
inline size_t PartStart(size_t i, size_t n, size_t length, size_t step) {
  const size_t steps = (length + step - 1) / step;
  return std::min(length, steps * i / n * step);
}

}  // namespace quweit
