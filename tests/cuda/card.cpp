// One CUDA device that asks no driver, for torch's autograd engine: its streams are equal and its
// events do nothing; and a clock without events for DistributedDataParallel.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return {type(), 0}; }
  Device getDevice() const override { return {type(), 0}; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, Device(type(), 0)); }
  Stream getNewStream(Device device, int) const override { return getStream(device); }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};

struct Hooks final : public at::CUDAHooksInterface {
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasCuDNN() const override { return true; }
  bool compiledWithCuDNN() const override { return true; }
  long versionCuDNN() const override { return 91200; }
  long versionRuntimeCuDNN() const override { return 91200; }
  long versionCuDNNFrontend() const override { return 11200; }
  double batchnormMinEpsilonCuDNN() const override { return 1e-5; }
  bool supportsDilatedConvolutionWithCuDNN() const override { return true; }
  bool supportsDepthwiseConvolutionWithCuDNN() const override { return true; }
  bool supportsBFloat16ConvolutionWithCuDNNv8() const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void init() const override {}
};

struct Clock final : public c10d::Timer {
  explicit Clock(Device) {}
  std::optional<int64_t> measureDifference(Event, Event) override { return std::nullopt; }
};

static Guard guard;
static Hooks hooks;

// torch holds the one object of hooks for good: it gets the table of functions of ours.
extern "C" void pretend_install() {
  static bool installed = false;
  if (installed) return;
  installed = true;
  const auto cuda = static_cast<size_t>(DeviceType::CUDA);
  c10::impl::device_guard_impl_registry[cuda].store(&guard);
  auto& theirs = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  *reinterpret_cast<void**>(&theirs) = *reinterpret_cast<void**>(&hooks);
  c10d::TimerRegistry()->Register(
      DeviceType::CUDA,
      [](Device device) -> std::unique_ptr<c10d::Timer> { return std::make_unique<Clock>(device); },
      c10::REGISTRY_PREFERRED);
}
