// SPDX-License-Identifier: Apache-2.0
// The processes of a dataflow region.
//
// For synthesis and the plain C simulation a process is its call. With EDGEMAT_THREADS the C simulation runs
// every process in a thread of its own, over all samples, against the declared depths of the streams between
// them.
#ifndef EDGEMAT_DATAFLOW_HPP
#define EDGEMAT_DATAFLOW_HPP

#if defined(EDGEMAT_THREADS) && !defined(__SYNTHESIS__)

#include <hls_stream.h>

#define EDGEMAT_REGION edgemat::sim::region edgemat_region;
#define EDGEMAT_PROCESS(name, ...) edgemat_region.add(name, [&]() { __VA_ARGS__; })

#else

#define EDGEMAT_REGION
#define EDGEMAT_PROCESS(name, ...) __VA_ARGS__

#endif

// With EDGEMAT_TRACE the C simulation writes the codes of every tensor to files (edgemat_trace.h beside the
// stream shim).
#if defined(EDGEMAT_TRACE) && !defined(__SYNTHESIS__)
#include <edgemat_trace.h>
#define EDGEMAT_TRACE_ARRAY(name, array, size) edgemat::sim::trace_array(name, array, size)
#else
#define EDGEMAT_TRACE_ARRAY(name, array, size)
#endif

#endif  // EDGEMAT_DATAFLOW_HPP
