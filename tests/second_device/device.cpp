// A device beside the CPU, as a GPU is one: its tensors cannot be mixed with the CPU's, and it counts its bytes.
// What it computes, the CPU computes for it (PyTorch's PrivateUse1, https://docs.pytorch.org/docs/stable/accelerator/).

// Only the headers that it needs: torch/extension.h takes three times as long to compile.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

using namespace at;

namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr auto kKey = c10::DispatchKey::PrivateUse1;

int64_t now = 0, peak = 0;

struct Block {
  size_t size;
  void* memory;
};

void give_back(void* context) {
  auto* block = static_cast<Block*>(context);
  now -= block->size;
  std::free(block->memory);
  delete block;
}

struct CountingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    auto* block = new Block{size, std::malloc(std::max<size_t>(size, 1))};
    std::memset(block->memory, 0xff, size);  // NaN, where nothing was written
    now += size;
    peak = std::max(peak, now);
    return {block->memory, block, &give_back, c10::Device(kDevice, 0)};
  }
  void copy_data(void* target, const void* source, size_t size) const override { std::memcpy(target, source, size); }
};

CountingAllocator allocator;

struct Hooks final : PrivateUse1HooksInterface {
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
};

Tensor as_of_cpu(const Tensor& tensor) {
  if (tensor.device().is_cpu()) return tensor;
  auto* memory = const_cast<void*>(tensor.const_data_ptr());
  return at::from_blob(memory, tensor.sizes(), tensor.strides(), tensor.options().device(kCPU));
}

Tensor empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device>,
             std::optional<bool>, std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(kKey), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>,
                     std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(kKey),
                                           c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool) {
  c10::InferenceMode guard(target.is_inference());
  as_of_cpu(target).copy_(as_of_cpu(source));
  return target;
}

const Tensor& resize(const Tensor& tensor, SymIntArrayRef size, std::optional<MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  auto storage = tensor.storage();
  size_t bytes = (tensor.storage_offset() + c10::multiply_integers(sizes)) * tensor.element_size();
  if (storage.nbytes() < bytes) {
    storage.set_data_ptr_noswap(allocator.allocate(bytes));
    storage.set_nbytes(bytes);
  }
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return tensor;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  resize(target, source.sym_sizes(), std::nullopt);
  return copy_from(source, target, false);
}

Scalar local_scalar(const Tensor& tensor) { return as_of_cpu(tensor).item(); }

Tensor as_strided(const Tensor& tensor, SymIntArrayRef size, SymIntArrayRef stride, std::optional<SymInt> offset) {
  auto first = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           first);
}

Tensor view(const Tensor& tensor, SymIntArrayRef size) {
  return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor reshape_alias(const Tensor& tensor, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::_reshape_alias(tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

void require_same(const Tensor& input, const Tensor& other) {
  TORCH_CHECK(input.device() == other.device(), "Expected all tensors to be on the same device in convolution");
}

Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, SymIntArrayRef stride,
                   SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding,
                   SymInt groups) {
  require_same(input, weight);
  std::optional<Tensor> added;
  if (bias && bias->defined()) {
    require_same(input, *bias);
    added = as_of_cpu(*bias);
  }
  return at::convolution_symint(as_of_cpu(input), as_of_cpu(weight), added, stride, padding, dilation, transposed,
                                output_padding, groups)
      .to(input.device());
}

// As CUDA has it, indices and numbers may come from the CPU.
void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  bool here = false, on_another = false;
  auto look = [&](const Tensor& tensor) {
    if (!tensor.defined()) return;
    if (!tensor.device().is_cpu()) here = true;
    else if (tensor.dim() > 0) on_another = true;
  };
  for (const auto& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (argument.isTensor()) look(argument.toTensor());
    if (argument.isTensorList())
      for (const Tensor& tensor : argument.toTensorVector()) look(tensor);
  }
  const auto& name = op.schema().name();
  TORCH_CHECK(!(here && on_another) || name.find("index") != std::string::npos,
              "Expected all tensors to be on the same device in ", name);
  at::native::cpu_fallback(op, stack);
}

REGISTER_ALLOCATOR(kDevice, &allocator);
C10_REGISTER_GUARD_IMPL(PrivateUse1, c10::impl::NoOpDeviceGuardImpl<kDevice>);

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("resize_", resize);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("convolution_overrideable", convolution);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

}  // namespace

extern "C" {
void start() { at::RegisterPrivateUse1HooksInterface(new Hooks()); }
int64_t now_bytes() { return now; }
int64_t peak_bytes() { return peak; }
void reset_peak() { peak = now; }
}
