// The native ops of attention over time and over space: reads the tensors, cuts them into sequences along one axis
// after the other, and spreads those over threads.
#include <memory>

#include "dispatch.h"
#include "divided_args.h"

namespace vidattn {
namespace {

// The fields of DividedCall in vidattn/calls.py, which says what they are.
struct DividedCall {
  explicit DividedCall(Arguments& from) : from(from) {}
  Arguments& from;
  const Tensor q = from.take<Tensor>(), k = from.take<Tensor>(), v = from.take<Tensor>();
  const MaybeTensor seed = from.take<MaybeTensor>();
  const int64_t num_frames = from.take<int64_t>();
  const bool time_fastest = from.take<bool>();
  const int64_t temporal_heads = from.take<int64_t>();
  const double scale = from.take<double>(), dropout_p = from.take<double>();
};

const DividedKernels& kernels(const DividedArgs& a) {
  return kernels_for<DividedKernels>(a.element, VIDATTN_KERNELS(divided));
}

DividedArgs make_args(const DividedCall& call, bool has_cls) {
  DividedArgs a{};
  read_common(call, a);
  const Tensor& q = call.q;
  a.batch = q.size(0), a.frames = call.num_frames, a.cls = has_cls;
  STD_TORCH_CHECK(a.frames >= 1 && q.size(1) > a.cls && (q.size(1) - a.cls) % a.frames == 0,
                  "expected num_frames * sites rows");
  a.tensor[kQ] = row_tensor(q, a.head_dim, a.cls);
  a.tensor[kK] = row_tensor(call.k, a.head_dim, a.cls);
  a.tensor[kV] = row_tensor(call.v, a.head_dim, a.cls);
  return a;
}

// Runs one pass for the heads that attend over time, then for those that attend over space.
void run_axes(DividedArgs& a, const DividedCall& call, bool backward) {
  const DividedKernels& cpu = kernels(a);
  const int64_t sites = (call.q.size(1) - a.cls) / a.frames;
  for (bool over_time : {true, false}) {
    a.first_head = over_time ? 0 : call.temporal_heads;
    a.num_heads = over_time ? call.temporal_heads : a.heads - call.temporal_heads;
    if (a.num_heads == 0) continue;
    STD_TORCH_CHECK(!over_time || !a.cls, "a cls token attends over space only");
    a.patches = over_time ? a.frames : sites;
    a.groups = over_time ? sites : a.frames;
    const int64_t frame_step = call.time_fastest ? 1 : sites, site_step = call.time_fastest ? a.frames : 1;
    a.position_step = over_time ? frame_step : site_step;
    a.group_step = over_time ? site_step : frame_step;
    a.short_sequences = !a.cls && a.patches <= kShortSequence && a.element != Element::float64;
    a.tasks = a.batch * a.groups * (a.short_sequences ? 1 : a.num_heads);
    run(a, cpu, backward, a.tasks, backward ? cpu.backward : cpu.forward);
  }
  if (!backward && !a.cls_mean.data) return;
  if (backward && !a.cls) return;
  for (int64_t clip = 0; clip < a.batch; ++clip) cpu.add_frames(a, backward, clip);
}

void forward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const DividedCall call(arguments);
  const Tensor out = arguments.take<Tensor>();
  const MaybeTensor cls = arguments.take<MaybeTensor>(), cls_mean = arguments.take<MaybeTensor>();
  const MaybeTensor lse = arguments.take<MaybeTensor>();
  DividedArgs a = make_args(call, cls.has_value());
  a.tensor[kOut] = row_tensor(out, a.head_dim);
  if (cls) a.cls_out = cls->data_ptr();
  if (cls_mean) {
    const int64_t bytes = bytes_of(a.element);
    a.cls_mean = {static_cast<char*>(cls_mean->data_ptr()), {cls_mean->stride(0) * bytes, 0, a.head_dim * bytes}};
  }
  STD_TORCH_CHECK(!lse, "the CPU's backward pass needs no log-sum-exp");
  run_axes(a, call, false);
}

void backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const DividedCall call(arguments);
  const Tensor dout = arguments.take<Tensor>();
  const MaybeTensor dcls = arguments.take<MaybeTensor>();
  arguments.take<MaybeTensor>();  // out,
  arguments.take<MaybeTensor>();  // cls and
  arguments.take<MaybeTensor>();  // lse are for backends that do not have a query's scores at hand all at once
  const Tensor dq = arguments.take<Tensor>(), dk = arguments.take<Tensor>(), dv = arguments.take<Tensor>();
  DividedArgs a = make_args(call, dcls.has_value());
  a.tensor[kDout] = row_tensor(dout, a.head_dim);
  a.tensor[kDq] = row_tensor(dq, a.head_dim, a.cls);
  a.tensor[kDk] = row_tensor(dk, a.head_dim, a.cls);
  a.tensor[kDv] = row_tensor(dv, a.head_dim, a.cls);
  std::unique_ptr<double[]> gradients;  // floats but for float64
  if (dcls) {
    STD_TORCH_CHECK(dcls->stride(-1) == 1 || dcls->size(-1) == 1, "the last dimension must be contiguous");
    a.dcls = dcls->data_ptr();
    a.dcls_stride[0] = dcls->stride(0), a.dcls_stride[1] = dcls->stride(1);
    const int64_t size = 3 * a.batch * a.frames * a.heads * a.head_dim;
    gradients.reset(new double[a.element == Element::float64 ? size : (size + 1) / 2]);
    a.cls_gradients = gradients.get();
  }
  run_axes(a, call, true);
}

}  // namespace
}  // namespace vidattn

STABLE_TORCH_LIBRARY_IMPL(vidattn, CPU, m) {
  m.impl("_divided_attention_forward", &vidattn::forward);
  m.impl("_divided_attention_backward", &vidattn::backward);
}
