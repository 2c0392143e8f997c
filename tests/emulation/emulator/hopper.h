// The instructions of csrc/cuda/device/hopper.h on the CPU. Clusters are not modelled, and neither are fences between proxies: their
// absence is seen in SASS only.
#pragma once

#include "mbarrier.h"
#include "tma.h"
#include "wgmma.h"
