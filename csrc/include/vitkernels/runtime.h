// The CUDA runtime as the bindings see it, without the CUDA headers.
#pragma once
#include <string>

namespace vitkernels {

struct CudaStatus {
  int runtime_version = 0;  // 13000 for 13.0
  int driver_version = 0;   // 0: no driver
  int devices = 0;
  std::string error;  // why no device can be used; empty when one can
};

CudaStatus cuda_status();

// Makes a device current for the scope. The host twin has one device, the host.
class ScopedDevice {
 public:
#ifdef VITKERNELS_HOST_TWIN
  explicit ScopedDevice(int) {}
#else
  explicit ScopedDevice(int device);
  ~ScopedDevice();

 private:
  int previous_;
  bool switched_;
#endif
};

}  // namespace vitkernels
