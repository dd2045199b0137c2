// SPDX-License-Identifier: Apache-2.0
// The test bench's files and ports. Not for synthesis.
#ifndef EDGEMAT_TESTBENCH_HPP
#define EDGEMAT_TESTBENCH_HPP

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <hls_stream.h>

#include "edgemat/types.hpp"

namespace edgemat {
namespace testbench {

// Hands out codes one after the other.
class source {
  public:
    explicit source(const std::vector<long long>& codes) : codes_(codes), next_(0) {}
    long long next() { return codes_[next_++]; }
    template <class T>
    void copy(T* elements, int size) {
        for (int i = 0; i < size; i++) elements[i] = next();
    }

  private:
    const std::vector<long long>& codes_;
    std::size_t next_;
};

template <class T>
void append(const T* elements, int size, std::vector<long long>& codes) {
    for (int i = 0; i < size; i++) codes.push_back(elements[i].to_int64());
}

template <int SIZE, class T, int LANES>
void push(source& feed, hls::stream<vec<T, LANES> >& port) {
    for (int first = 0; first < SIZE; first += LANES) {
        vec<T, LANES> beat;
        feed.copy(beat.data, LANES);
        port.write(beat);
    }
}

template <int SIZE, class T, int LANES>
void pop(hls::stream<vec<T, LANES> >& port, std::vector<long long>& codes) {
    for (int first = 0; first < SIZE; first += LANES) {
        const vec<T, LANES> beat = port.read();
        append(beat.data, LANES, codes);
    }
}

// Samples per call of the top function: one, or with threads all of them, back to back.
inline int batch(int samples) {
#ifdef EDGEMAT_THREADS
    sim::state().samples = samples;
    return samples;
#else
    (void)samples;
    return 1;
#endif
}

inline std::vector<long long> read_codes(const char* path) {
    std::FILE* file = std::fopen(path, "rb");
    if (file == NULL) {
        std::fprintf(stderr, "edgemat: %s cannot be read\n", path);
        std::exit(2);
    }
    std::vector<long long> codes;
    unsigned char bytes[8];
    while (std::fread(bytes, 1, 8, file) == 8) {
        unsigned long long code = 0;
        for (int i = 7; i >= 0; i--) code = code << 8 | bytes[i];
        codes.push_back(static_cast<long long>(code));
    }
    std::fclose(file);
    return codes;
}

// The folder of the external memories' files.
inline std::string& memory_folder() {
    static std::string folder = "memory";
    return folder;
}

// An external memory: COUNT words, each with its lowest byte first.
template <class W>
std::vector<W> read_memory(const char* name, std::size_t count) {
    const std::string path = memory_folder() + "/" + name;
    const int bytes = W::width / 8;
    std::FILE* file = std::fopen(path.c_str(), "rb");
    std::vector<W> words(count);
    bool good = file != NULL;
    unsigned char word[bytes];
    for (std::size_t i = 0; good && i < count; i++) {
        good = std::fread(word, 1, bytes, file) == static_cast<std::size_t>(bytes);
        for (int b = 0; good && b < bytes; b++) words[i].range(8 * b + 7, 8 * b) = word[b];
    }
    good = good && std::fgetc(file) == EOF;
    if (file != NULL) std::fclose(file);
    if (!good) {
        std::fprintf(stderr, "edgemat: %s does not hold %lu words of %d bytes\n", path.c_str(),
                     static_cast<unsigned long>(count), bytes);
        std::exit(2);
    }
    return words;
}

inline void write_codes(const char* path, const std::vector<long long>& codes) {
    std::FILE* file = std::fopen(path, "wb");
    bool good = file != NULL;
    for (std::size_t i = 0; good && i < codes.size(); i++) {
        unsigned char bytes[8];
        unsigned long long code = static_cast<unsigned long long>(codes[i]);
        for (int b = 0; b < 8; b++, code >>= 8) bytes[b] = static_cast<unsigned char>(code & 255);
        good = std::fwrite(bytes, 1, 8, file) == 8;
    }
    if (file != NULL) good = std::fclose(file) == 0 && good;
    if (!good) {
        std::fprintf(stderr, "edgemat: %s cannot be written\n", path);
        std::exit(2);
    }
}

typedef void (*runner)(const std::vector<long long>& inputs, std::vector<long long>& outputs, int samples);

inline int main(int count, char** arguments, int input_size, int output_size, runner run) {
    const bool files = count >= 3;
    if (count == 4) memory_folder() = arguments[3];
    const std::vector<long long> inputs = read_codes(files ? arguments[1] : "vectors/inputs.bin");
    const int samples = static_cast<int>(inputs.size() / static_cast<std::size_t>(input_size));
    std::vector<long long> outputs;
    run(inputs, outputs, samples);
    if (files) {
        write_codes(arguments[2], outputs);
        return 0;
    }
    const std::vector<long long> expected = read_codes("vectors/expected.bin");
    std::size_t wrong = outputs.size() == expected.size() ? 0 : 1;
    for (std::size_t i = 0; i < outputs.size() && i < expected.size(); i++) {
        if (outputs[i] == expected[i]) continue;
        if (wrong++ < 10) {
            std::printf("sample %lu, element %lu: found %lld, expected %lld\n",
                        static_cast<unsigned long>(i / static_cast<std::size_t>(output_size)),
                        static_cast<unsigned long>(i % static_cast<std::size_t>(output_size)), outputs[i],
                        expected[i]);
        }
    }
    std::printf("%d samples, %lu codes: %s\n", samples, static_cast<unsigned long>(outputs.size()),
                wrong == 0 ? "exact" : "WRONG");
    return wrong == 0 ? 0 : 1;
}

}  // namespace testbench
}  // namespace edgemat

#endif  // EDGEMAT_TESTBENCH_HPP
