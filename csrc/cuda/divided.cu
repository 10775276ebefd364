// Attention over time and over space on CUDA: which rows make a sequence, and what its frames have for a cls token.
#include "divided_cuda.h"
#include "sequences_host.h"

namespace vidattn::cuda {
namespace {

constexpr int kThreads = 128;

struct ClsArguments {
  int64_t clips, frames, heads, head_dim;
  // To 16 bits: (clips, frames, 2, heads, head_dim), the gradient of the context and the context.
  const float *context, *gradient;  // the first is contiguous: (clips, frames, heads, head_dim)
  int64_t gradient_stride[2];
  char* narrow;
  // Sums of frames: (clips, frames, parts, heads, head_dim), times a factor.
  const float* parts;
  int64_t num_parts;
  SequenceRows to[3];
  float factor;
};

// Rounds what is known of the cls token in each frame, so that it can be read as all other rows are.
template <class T>
__global__ void __launch_bounds__(kThreads) narrow_cls(const __grid_constant__ ClsArguments a) {
  const int64_t row = a.heads * a.head_dim, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.clips * a.frames * row) return;
  const int64_t frame = i / row, element = i % row;
  const float* gradient =
      a.gradient + frame / a.frames * a.gradient_stride[0] + frame % a.frames * a.gradient_stride[1];
  uint16_t* to = reinterpret_cast<uint16_t*>(a.narrow) + 2 * frame * row + element;
  to[0] = uint16_t(gpu::pack<T>(gradient[element], 0.0f));
  to[row] = uint16_t(gpu::pack<T>(a.context[i], 0.0f));
}

// Adds up what the frames of a clip have for the cls token, in order.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_frames(const __grid_constant__ ClsArguments a) {
  const int64_t row = a.heads * a.head_dim, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.clips * a.num_parts * row) return;
  const int64_t clip = i / (a.num_parts * row), element = i % row;
  const int part = int(i / row % a.num_parts);
  const float* from = a.parts + (clip * a.frames * a.num_parts + part) * row + element;
  double sum = 0;
#pragma unroll 4
  for (int64_t frame = 0; frame < a.frames; ++frame) sum += from[frame * a.num_parts * row];
  const SequenceRows& to = a.to[part];
  char* place = to.cls + clip * to.cls_stride[0] + element / a.head_dim * to.cls_head_stride;
  reinterpret_cast<uint16_t*>(place)[element % a.head_dim] = uint16_t(gpu::pack<T>(float(sum * a.factor), 0.0f));
}

template <class Kernel>
const char* launch_cls(Kernel* kernel, const ClsArguments& a, int64_t count, void* stream) {
  return gpu::launch(kernel, dim3(uint32_t(ceil_div(count, kThreads))), dim3(kThreads), 0, stream, a);
}
const char* launch_sum_frames(const ClsArguments& a, Element element, void* stream) {
  const int64_t count = a.clips * a.num_parts * a.heads * a.head_dim;
  return element == Element::float16 ? launch_cls(sum_frames<__half>, a, count, stream)
                                     : launch_cls(sum_frames<__nv_bfloat16>, a, count, stream);
}

SequenceArguments arguments_of(const DividedArgs& call) {
  SequenceArguments a{};
  a.heads = Divisor(call.num_heads), a.sequences = Divisor(call.groups);
  a.first_head = int(call.first_head), a.all_heads = int(call.heads);
  a.cls = int(call.cls), a.keys = int(call.cls + call.patches), a.head_dim = int(call.head_dim);
  for (int slot = 0; slot < kSlots; ++slot)
    if (const RowTensor& t = call.tensor[slot]; t.data)
      a.rows[slot] = sequence_rows(t, call.head_dim, t.stride[0], call.group_step * t.stride[1], call.position_step);
  const int64_t patches = call.frames * call.sites;
  a.lse = static_cast<float*>(call.lse), a.lse_cls = a.lse + patches * call.heads;
  a.lse_clip = (patches + call.cls * call.frames) * call.heads;
  a.lse_sequence = call.group_step * call.heads, a.lse_row = call.position_step * call.heads;
  a.cls_out = static_cast<float*>(call.cls_out);
  complete(a, call.scale);
  return a;
}

ClsArguments cls_arguments(const DividedArgs& call) {
  ClsArguments a{};
  a.clips = call.batch, a.frames = call.frames, a.heads = call.heads, a.head_dim = call.head_dim;
  return a;
}

// The parts of a workspace, each from a multiple of 16 bytes on.
struct Workspace {
  int64_t dq, gradients, narrow;  // floats

  explicit Workspace(const DividedArgs& call)
      : dq(sequences_backward_floats(call.cls + call.patches, call.head_dim,
                                     call.batch * call.groups * call.num_heads)) {
    const int64_t tokens = call.cls * call.batch * call.frames * call.heads * call.head_dim;
    gradients = round_up(3 * tokens, 4), narrow = tokens;  // two of 16 bits
  }
};

}  // namespace

const char* divided_forward(const DividedArgs& call, void* stream) {
  const SequenceArguments a = arguments_of(call);
  const char* error = launch_sequences_forward(a, call.batch * call.groups, call.element, stream);
  if (error || !call.cls_mean.data) return error;
  ClsArguments mean = cls_arguments(call);
  mean.parts = a.cls_out, mean.num_parts = 1, mean.factor = 1.0f / float(call.frames);
  mean.to[0] = sequence_rows(call.cls_mean, call.head_dim, call.cls_mean.stride[0], 0, 0);
  return launch_sum_frames(mean, call.element, stream);
}

int64_t divided_backward_floats(const DividedArgs& call) {
  const Workspace sizes(call);
  return sizes.dq + sizes.gradients + sizes.narrow;
}

const char* divided_backward(const DividedArgs& call, float* workspace, void* stream) {
  SequenceArguments a = arguments_of(call);
  ClsArguments cls = cls_arguments(call);
  const Workspace sizes(call);
  if (call.cls) {
    a.cls_gradients = workspace + sizes.dq;
    cls.narrow = reinterpret_cast<char*>(workspace + sizes.dq + sizes.gradients);
    cls.context = a.cls_out, cls.gradient = static_cast<const float*>(call.dcls);
    cls.gradient_stride[0] = call.dcls_stride[0], cls.gradient_stride[1] = call.dcls_stride[1];
    const int64_t row = 2 * call.heads * call.head_dim;
    for (Slot slot : {kDout, kOut}) {
      SequenceRows& rows = a.rows[slot];
      rows.cls = cls.narrow + (slot == kOut ? row : 0), rows.cls_head_stride = 2 * call.head_dim;
      rows.cls_stride[0] = 2 * row * call.frames, rows.cls_stride[1] = 2 * row;
    }
    const int64_t count = call.batch * call.frames * call.heads * call.head_dim;
    const char* error = call.element == Element::float16 ? launch_cls(narrow_cls<__half>, cls, count, stream)
                                                         : launch_cls(narrow_cls<__nv_bfloat16>, cls, count, stream);
    if (error) return error;
  }
  const char* error = launch_sequences_backward(a, call.batch * call.groups, call.element, workspace, stream);
  if (error || !call.cls) return error;
  cls.parts = a.cls_gradients, cls.num_parts = 3, cls.factor = 1.0f;
  for (int part = 0; part < 3; ++part) cls.to[part] = a.rows[kDq + part];
  return launch_sum_frames(cls, call.element, stream);
}

}  // namespace vidattn::cuda
