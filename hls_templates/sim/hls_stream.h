// SPDX-License-Identifier: Apache-2.0
// A small hls::stream for C simulation where the vendor's header is absent. Never used for synthesis.
//
// By default a stream is unbounded; reading an empty one stops the program and names the stream, as does a
// stream that still holds data when it goes out of scope. With EDGEMAT_THREADS the processes of a region run
// in threads, a stream of declared depth D blocks its writer at D elements, and when every process waits the
// program names them and exits with status 3.
#ifndef EDGEMAT_SIM_HLS_STREAM_H
#define EDGEMAT_SIM_HLS_STREAM_H

#ifdef EDGEMAT_TRACE
#include <edgemat_trace.h>
#endif

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <vector>

#ifdef EDGEMAT_THREADS
#include <condition_variable>
#include <functional>
#include <list>
#include <mutex>
#include <thread>

namespace edgemat {
namespace sim {

struct process {
    const char* name;
    std::function<void()> body;
    std::condition_variable wake;
    const char* stream;  // what it waits for; null while it runs
    bool reading;
    std::size_t depth;
};

struct scheduler {
    std::mutex lock;
    std::list<process> processes;
    std::size_t active = 0;
    std::size_t waiting = 0;
    int samples = 1;
};
inline scheduler& state() {
    static scheduler shared;
    return shared;
}
inline process*& self() {
    static thread_local process* current = nullptr;
    return current;
}

[[noreturn]] inline void report_deadlock() {
    std::fprintf(stderr, "edgemat: deadlock, every process waits:\n");
    for (const process& p : state().processes) {
        if (p.stream == nullptr) continue;
        if (p.reading) {
            std::fprintf(stderr, "  process %s waits to read the empty FIFO %s\n", p.name, p.stream);
        } else {
            std::fprintf(stderr, "  process %s waits to write the full FIFO %s (depth %lu)\n", p.name,
                         p.stream, static_cast<unsigned long>(p.depth));
        }
    }
    std::fflush(stderr);
    std::_Exit(3);
}

// Sleep until the other side of `stream` moves. The scheduler's lock is held.
inline void wait(std::unique_lock<std::mutex>& held, process** slot, const char* stream, bool reading,
                 std::size_t depth) {
    scheduler& s = state();
    process* me = self();
    *slot = me;
    me->stream = stream;
    me->reading = reading;
    me->depth = depth;
    if (++s.waiting == s.active) report_deadlock();
    while (me->stream != nullptr) me->wake.wait(held);
}

// The other side moved: whoever waits in `slot` may run.
inline void resume(process** slot) {
    if (*slot == nullptr) return;
    (*slot)->stream = nullptr;
    --state().waiting;
    (*slot)->wake.notify_one();
    *slot = nullptr;
}

// Runs its processes when it goes out of scope.
class region {
  public:
    void add(const char* name, std::function<void()> body) {
        state().processes.emplace_back();
        process& p = state().processes.back();
        p.name = name;
        p.body = body;
        p.stream = nullptr;
    }
    ~region() {
        scheduler& s = state();
        s.active = s.processes.size();
        std::vector<std::thread> threads;
        for (process& p : s.processes) threads.emplace_back([&p]() { run(p); });
        for (std::thread& t : threads) t.join();
        s.processes.clear();
    }

  private:
    static void run(process& p) {
        self() = &p;
        for (int sample = 0; sample < state().samples; sample++) p.body();
        std::unique_lock<std::mutex> held(state().lock);
        if (--state().active > 0 && state().waiting == state().active) report_deadlock();
    }
};

}  // namespace sim
}  // namespace edgemat
#endif  // EDGEMAT_THREADS

namespace hls {

template <class T, int DEPTH = 0>
class stream;

template <class T>
class stream<T, 0> {
  public:
    stream() : stream("unnamed", 0) {}
    explicit stream(const char* name) : stream(name, 0) {}
    stream(const stream&) = delete;
    stream& operator=(const stream&) = delete;
    ~stream() {
        if (count_ == 0) return;
        std::fprintf(stderr, "edgemat: the stream %s is left with %lu elements\n", name_,
                     static_cast<unsigned long>(count_));
        std::fflush(stderr);
        std::_Exit(4);
    }

    bool empty() const { return count_ == 0; }
    std::size_t size() const { return count_; }

    T read() {
#ifdef EDGEMAT_THREADS
        std::unique_lock<std::mutex> held(edgemat::sim::state().lock);
        if (edgemat::sim::self() != nullptr) {
            while (count_ == 0) edgemat::sim::wait(held, &reader_, name_, true, depth_);
            edgemat::sim::resume(&writer_);
        }
#endif
        if (count_ == 0) {
            std::fprintf(stderr, "edgemat: read of the empty stream %s\n", name_);
            std::fflush(stderr);
            std::_Exit(4);
        }
        const T element = ring_[head_];
        head_ = head_ + 1 == ring_.size() ? 0 : head_ + 1;
        count_--;
        return element;
    }
    void read(T& element) { element = read(); }
    stream& operator>>(T& element) {
        element = read();
        return *this;
    }

    void write(const T& element) {
#ifdef EDGEMAT_TRACE
        edgemat::sim::trace_beat(name_, element);
#endif
#ifdef EDGEMAT_THREADS
        std::unique_lock<std::mutex> held(edgemat::sim::state().lock);
        if (edgemat::sim::self() != nullptr) {
            while (depth_ > 0 && count_ >= depth_) edgemat::sim::wait(held, &writer_, name_, false, depth_);
            edgemat::sim::resume(&reader_);
        }
#endif
        if (count_ == ring_.size()) grow();
        std::size_t tail = head_ + count_;
        if (tail >= ring_.size()) tail -= ring_.size();
        ring_[tail] = element;
        count_++;
    }
    stream& operator<<(const T& element) {
        write(element);
        return *this;
    }

  protected:
    stream(const char* name, std::size_t depth) : name_(name), depth_(depth), head_(0), count_(0) {}

  private:
    void grow() {
        std::vector<T> wider(ring_.empty() ? 16 : 2 * ring_.size());
        for (std::size_t i = 0; i < count_; i++) wider[i] = ring_[(head_ + i) % ring_.size()];
        ring_.swap(wider);
        head_ = 0;
    }

    const char* name_;
    std::size_t depth_;
    std::vector<T> ring_;
    std::size_t head_;
    std::size_t count_;
#ifdef EDGEMAT_THREADS
    edgemat::sim::process* reader_ = nullptr;
    edgemat::sim::process* writer_ = nullptr;
#endif
};

// A stream of declared depth; it converts to the plain stream that functions take.
template <class T, int DEPTH>
class stream : public stream<T, 0> {
  public:
    stream() : stream<T, 0>("unnamed", DEPTH) {}
    explicit stream(const char* name) : stream<T, 0>(name, DEPTH) {}
};

}  // namespace hls

#endif  // EDGEMAT_SIM_HLS_STREAM_H
