// Runs a grid: every block, every thread of it, on the calling CPU thread.
#pragma once

#include <optional>
#include <random>

#include "block.h"

namespace emulator {

inline void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &grid->bottom, &grid->size);
#endif
  try {
    grid->body();
  } catch (...) {
    if (!grid->fault) grid->fault = std::current_exception();
  }
  {
    const Quiet quiet;
    Fiber& fiber = self();
    Block& own = block();
    fiber.state = Fiber::State::done;
    warp().exited |= 1u << fiber.lane();
    if (--own.live) open_if_complete(own.barriers[0], own.live);
    release(grid);  // all that a launch does is done before what the host does next
  }
  to_loop(*grid);
  abort();
}

inline void start(Block& own, uint3 index, std::size_t dynamic) {
  const uint3 size = grid->block;
  own.index = index;
  own.live = size.x * size.y * size.z;
  own.fibers.resize(own.live);
  own.warps.resize((own.live + 31) / 32);
  if (dynamic) allocate_shared(own, dynamic);
  for (unsigned i = 0; i < own.live; ++i) {
    Fiber& fiber = own.fibers[i];
    fiber.block = &own;
    fiber.number = i;
    fiber.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    prepare(fiber, entry);
    grid->next.push_back(&fiber);
  }
}

inline std::string deadlock(const std::vector<std::unique_ptr<Block>>& blocks) {
  std::string text = "deadlock, no thread can run:";
  for (const auto& b : blocks)
    for (const Fiber& fiber : b->fibers)
      if (fiber.state == Fiber::State::waiting && text.size() < 600)
        text += " block " + std::to_string(b->index.x) + "," + std::to_string(b->index.y) + " thread " + std::to_string(fiber.number) +
                " waits for " + fiber.awaited + " at " + text_of(fiber.where) + ";";
  return text;
}

inline void launch(uint3 size, uint3 block_size, std::size_t dynamic, std::function<void()> body) {
  const Quiet quiet;
  const uint64_t blocks = uint64_t{size.x} * size.y * size.z;
  const uint64_t threads = uint64_t{block_size.x} * block_size.y * block_size.z;
  if (!blocks || !threads || threads > 1024 || size.x > INT32_MAX || size.y > 65535 || size.z > 65535)
    throw Fault("launch: a grid of " + std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads");
  if (grid) throw Fault("launch inside a kernel");
  ++counts.launches;
  // Not on the stack, which what comes next will write: a thread reads its grid on the way out, after it has released what it did.
  static thread_local std::optional<Grid> kept;
  Grid& state = kept.emplace();
  grid = &state;
  state.grid = size;
  state.block = block_size;
  state.body = std::move(body);
  std::mt19937 random(options.seed);
  std::vector<std::unique_ptr<Block>> live;
  uint64_t started = 0;
  const auto fill = [&] {
    for (; static_cast<int>(live.size()) < options.resident && started < blocks; ++started) {
      live.push_back(std::make_unique<Block>());
      // The order of blocks is as free as that of threads.
      const uint64_t b = options.order == Order::reverse ? blocks - 1 - started : started;
      start(*live.back(),
            {static_cast<unsigned>(b % size.x), static_cast<unsigned>(b / size.x % size.y),
             static_cast<unsigned>(b / (uint64_t{size.x} * size.y))},
            dynamic);
    }
  };
  try {
    fill();
    while (!live.empty() && !state.fault) {
      std::vector<Fiber*> round;
      round.swap(state.next);
      if (round.empty()) throw Fault(deadlock(live));
      // Not the list the other way round: what waits at a barrier is listed as it came, and would come out forward.
      if (options.order == Order::reverse)
        std::stable_sort(round.begin(), round.end(), [](const Fiber* a, const Fiber* b) { return a->number > b->number; });
      if (options.order == Order::shuffled) std::shuffle(round.begin(), round.end(), random);
      for (Fiber* const fiber : round) {
        to_fiber(state, *fiber);
        if (state.fault) break;
      }
      for (std::size_t i = 0; i < live.size();)
        if (live[i]->live || state.fault) {
          ++i;
        } else {
          for (Fiber& fiber : live[i]->fibers) dispose(fiber, state);
          live.erase(live.begin() + static_cast<std::ptrdiff_t>(i));
        }
      fill();
    }
  } catch (...) {
    if (!state.fault) state.fault = std::current_exception();
  }
  for (const auto& b : live)  // only after a fault
    for (Fiber& fiber : b->fibers) dispose(fiber, state);
  acquire(grid);
  grid = nullptr;
  if (state.fault) std::rethrow_exception(state.fault);
}

}  // namespace emulator
