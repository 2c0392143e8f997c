from cmoe_kernels.nn import convert as convert
