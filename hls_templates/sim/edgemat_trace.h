// SPDX-License-Identifier: Apache-2.0
// Writes every element of every tensor, as little-endian 64-bit codes, to <folder>/<name>.bin. The folder
// comes from the environment variable EDGEMAT_TRACE_FOLDER. C simulation only.
#ifndef EDGEMAT_SIM_TRACE_H
#define EDGEMAT_SIM_TRACE_H

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

namespace edgemat {

template <class T, int LANES>
struct vec;

namespace sim {

class trace_files {
  public:
    std::FILE* open(const char* name) {
        std::FILE*& file = files_[name];
        if (file == nullptr) {
            const char* folder = std::getenv("EDGEMAT_TRACE_FOLDER");
            const std::string path = std::string(folder == nullptr ? "." : folder) + "/" + name + ".bin";
            file = std::fopen(path.c_str(), "wb");
            if (file == nullptr) {
                std::fprintf(stderr, "edgemat: the trace %s cannot be written\n", path.c_str());
                std::exit(1);
            }
        }
        return file;
    }
    ~trace_files() {
        for (auto& entry : files_) std::fclose(entry.second);
    }

  private:
    std::map<std::string, std::FILE*> files_;
};

template <class T>
void trace_array(const char* name, const T* elements, int size) {
    static trace_files files;
    std::FILE* file = files.open(name);
    for (int i = 0; i < size; i++) {
        unsigned long long code = static_cast<unsigned long long>(elements[i].to_int64());
        for (int byte = 0; byte < 8; byte++, code >>= 8) std::fputc(static_cast<int>(code & 255), file);
    }
}

template <class T, int LANES>
void trace_beat(const char* name, const vec<T, LANES>& beat) {
    trace_array(name, beat.data, LANES);
}
// Words of a port carry no elements of their own.
template <class Word>
void trace_beat(const char*, const Word&) {}

}  // namespace sim
}  // namespace edgemat

#endif  // EDGEMAT_SIM_TRACE_H
