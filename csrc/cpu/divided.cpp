// The native ops of attention over time and over space: reads the tensors, cuts them into sequences along one axis
// after the other, and spreads those over threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <memory>
#include <optional>

#include "dispatch.h"
#include "divided_args.h"

namespace vidattn {
namespace {

using torch::stable::Tensor;

const DividedKernels& kernels(Element element) {
#if defined(__x86_64__)
  return kernels_for(element, divided_baseline, divided_avx2, divided_avx512, divided_avx512bf16);
#else
  return kernels_for(element, divided_baseline, divided_baseline, divided_baseline, divided_baseline.float32);
#endif
}

// (B, rows, h, d), or its last two dimensions merged; from row `first` on.
RowTensor row_tensor(const Tensor& t, int64_t head_dim, int64_t first) {
  STD_TORCH_CHECK(t.stride(-1) == 1 || t.size(-1) == 1, "the last dimension must be contiguous");
  const int64_t bytes = static_cast<int64_t>(t.element_size());
  return {static_cast<char*>(t.data_ptr()) + first * t.stride(1) * bytes,
          {t.stride(0) * bytes, t.stride(1) * bytes, (t.dim() == 3 ? head_dim : t.stride(2)) * bytes}};
}

DividedArgs make_args(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& seed,
                      int64_t num_frames, bool has_cls, double scale, double dropout_p) {
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                  "expected q, k and v of one dtype");
  DividedArgs a{};
  a.element = element_of(q);
  a.batch = q.size(0), a.heads = q.size(2), a.head_dim = q.size(3), a.frames = num_frames, a.cls = has_cls;
  STD_TORCH_CHECK(a.head_dim >= 1 && a.head_dim <= 128, "expected head_dim between 1 and 128, got ", a.head_dim);
  STD_TORCH_CHECK(num_frames >= 1 && q.size(1) > a.cls && (q.size(1) - a.cls) % num_frames == 0,
                  "expected num_frames * sites rows");
  a.tensor[kQ] = row_tensor(q, a.head_dim, a.cls);
  a.tensor[kK] = row_tensor(k, a.head_dim, a.cls);
  a.tensor[kV] = row_tensor(v, a.head_dim, a.cls);
  a.scale = scale, a.dropout_p = dropout_p;
  if (dropout_p > 0) {
    STD_TORCH_CHECK(seed.has_value(), "dropout needs a seed");
    a.seed = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
  }
  return a;
}

// Runs one pass for the heads that attend over time, then for those that attend over space.
void run_axes(DividedArgs& a, const Tensor& q, bool time_fastest, int64_t temporal_heads, bool backward) {
  const DividedKernels& cpu = kernels(a.element);
  const int64_t sites = (q.size(1) - a.cls) / a.frames;
  for (bool over_time : {true, false}) {
    a.first_head = over_time ? 0 : temporal_heads;
    a.num_heads = over_time ? temporal_heads : a.heads - temporal_heads;
    if (a.num_heads == 0) continue;
    STD_TORCH_CHECK(!over_time || !a.cls, "a cls token attends over space only");
    a.patches = over_time ? a.frames : sites;
    a.groups = over_time ? sites : a.frames;
    const int64_t frame_step = time_fastest ? 1 : sites, site_step = time_fastest ? a.frames : 1;
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

void forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> seed, int64_t num_frames, bool time_fastest,
             int64_t temporal_heads, double scale, double dropout_p, Tensor out, std::optional<Tensor> cls,
             std::optional<Tensor> cls_mean, std::optional<Tensor> lse) {
  DividedArgs a = make_args(q, k, v, seed, num_frames, cls.has_value(), scale, dropout_p);
  a.tensor[kOut] = row_tensor(out, a.head_dim, 0);
  if (cls) a.cls_out = cls->data_ptr();
  if (cls_mean) {
    const int64_t bytes = bytes_of(a.element);
    a.cls_mean = {static_cast<char*>(cls_mean->data_ptr()), {cls_mean->stride(0) * bytes, 0, a.head_dim * bytes}};
  }
  STD_TORCH_CHECK(!lse, "the CPU's backward pass needs no log-sum-exp");
  run_axes(a, q, time_fastest, temporal_heads, false);
}

// `out`, `cls` and `lse` are for backends that do not have a query's scores at hand all at once.
void backward(Tensor dout, std::optional<Tensor> dcls, Tensor q, Tensor k, Tensor v, std::optional<Tensor> seed,
              int64_t num_frames, bool time_fastest, int64_t temporal_heads, double scale, double dropout_p,
              std::optional<Tensor> out, std::optional<Tensor> cls, std::optional<Tensor> lse, Tensor dq, Tensor dk,
              Tensor dv) {
  DividedArgs a = make_args(q, k, v, seed, num_frames, dcls.has_value(), scale, dropout_p);
  a.tensor[kDout] = row_tensor(dout, a.head_dim, 0);
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
  run_axes(a, q, time_fastest, temporal_heads, true);
}

}  // namespace
}  // namespace vidattn

STABLE_TORCH_LIBRARY_IMPL(vidattn, CPU, m) {
  m.impl("_divided_attention_forward", TORCH_BOX(&vidattn::forward));
  m.impl("_divided_attention_backward", TORCH_BOX(&vidattn::backward));
}
