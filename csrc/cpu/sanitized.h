// What builds with a sanitizer have instead of torch's threads, which are OpenMP's: how those wait for each other no
// sanitizer sees.
#pragma once
#include <algorithm>
#include <climits>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace vidattn {

// Makes the mistake that VIDATTN_MISTAKE names: what is run with one has to fail.
inline void make_mistake() {
  static const char* named = std::getenv("VIDATTN_MISTAKE");
  static volatile int64_t shared = 0;
  const std::string mistake = named ? named : "";
  if (mistake == "race") shared = shared + 1;
  if (mistake == "address") {
    std::unique_ptr<char[]> gone(new char[4]);
    volatile char* place = gone.get();
    gone.reset();
    *place = 1;
  }
  if (mistake == "undefined") {
    volatile int large = INT_MAX;
    large = large + 1;
  }
  if (mistake == "leak") {
    volatile char* lost = new char[1000];
    lost[0] = 1;
  }
}

template <class F>
void on_own_threads(int64_t begin, int64_t end, int64_t grain, const F& work) {
  const int64_t size = end - begin, most = size / std::max<int64_t>(grain, 1);
  const int64_t count = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), most));
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count && size > 0; ++i)
    threads.emplace_back([&, i] {
      make_mistake();
      work(begin + size * i / count, begin + size * (i + 1) / count);
    });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace vidattn
