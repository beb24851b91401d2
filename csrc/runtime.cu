#include <cuda_runtime.h>

#include <stdexcept>

#include "vitkernels/runtime.h"

namespace vitkernels {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace

CudaStatus cuda_status() {
  CudaStatus status;
  cudaRuntimeGetVersion(&status.runtime_version);
  cudaDriverGetVersion(&status.driver_version);
  const cudaError_t error = cudaGetDeviceCount(&status.devices);
  if (error != cudaSuccess) {
    status.devices = 0;
    status.error = cudaGetErrorString(error);
    cudaGetLastError();  // a failed query must not be reported by the next launch
  }
  return status;
}

ScopedDevice::ScopedDevice(int device) {
  check(cudaGetDevice(&previous_), "cudaGetDevice");
  switched_ = previous_ != device;
  if (switched_) check(cudaSetDevice(device), "cudaSetDevice");
}

ScopedDevice::~ScopedDevice() {
  if (switched_) cudaSetDevice(previous_);
}

}  // namespace vitkernels
