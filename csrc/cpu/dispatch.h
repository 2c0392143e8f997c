// The instruction set that runs here; see dispatch.cpp.
#pragma once

#include <string>

namespace cmoe::cpu {

const char* isa_name();
const std::string& isa_names();     // all that could run here, best first
const std::string& isa_left_out();  // empty, or the better ones that failed their self-test, and how
const std::string& isa_error();     // empty, or why CMOE_CPU_ISA cannot be followed

struct Int8Layout {
  int lanes, step, depth;
  bool products;
};
Int8Layout int8_layout();

}  // namespace cmoe::cpu
