// A libcuda.so.1 for test_device.py: a driver of the CUDA version DRIVER_VERSION (12080 for 12.8) whose start ends with
// the status DRIVER_STATUS. It has no GPUs: with a driver that shows some, the CUDA runtime checks that it is NVIDIA's.
#include <cstdlib>

static int told(const char* name) {
    const char* value = getenv(name);
    return value ? atoi(value) : 0;
}
extern "C" int cuDriverGetVersion(int* version) { return *version = told("DRIVER_VERSION"), 0; }
extern "C" int cuInit(unsigned) { return told("DRIVER_STATUS"); }
