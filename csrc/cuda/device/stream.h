// A stream, for files that include nothing of CUDA.
#pragma once

namespace cmoe::cuda {

using Stream = void*;  // a cudaStream_t

}  // namespace cmoe::cuda
