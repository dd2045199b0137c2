// SPDX-License-Identifier: Apache-2.0
// Embedding: rows of a table by index, y[r][d] = table[x[r]][d].
//
// C: rows (indices of a sample), depth (codes of a row of the table), entries (rows of the table), table(i);
//    x0_size, y_size. An index is proved to lie below `entries`; one from outside is the caller's to check.
#ifndef EDGEMAT_EMBEDDING_HPP
#define EDGEMAT_EMBEDDING_HPP

#include "edgemat/rounding.hpp"
#include "edgemat/stream.hpp"

namespace edgemat {

template <class C>
void embedding(const typename C::x0_t x[C::x0_size], typename C::y_t y[C::y_size]) {
    for (int r = 0; r < C::rows; r++) {
        const int first = static_cast<int>(operand(x[r])) * C::depth;
        for (int d = 0; d < C::depth; d++) {
#pragma HLS PIPELINE II = 1
            y[r * C::depth + d] = finish<C>(typename C::acc_t(C::table(first + d)), d % C::channels);
        }
    }
}

// Holds the indices of one sample, then runs the array form.
template <class C>
void embedding_stream(hls::stream<vec<typename C::x0_t, C::x0_lanes> >& x,
                      hls::stream<vec<typename C::y_t, C::y_lanes> >& y) {
    typename C::x0_t sample[C::x0_size];
    typename C::y_t results[C::y_size];
    read_elements<C::x0_size>(x, sample);
    embedding<C>(sample, results);
    write_elements<C::y_size>(results, y);
}

}  // namespace edgemat

#endif  // EDGEMAT_EMBEDDING_HPP
