// Space-time mixing attention on CUDA: the tokens of a frame as a sequence, a segment of frames as a clip.
#include "mixing_cuda.h"
#include "sequences_host.h"

namespace vidattn::cuda {
namespace {

SequenceArguments arguments_of(const MixingArgs& call) {
  SequenceArguments a{};
  a.heads = Divisor(call.heads), a.sequences = Divisor(call.segment);
  a.all_heads = int(call.heads), a.keys = int(call.tokens), a.head_dim = int(call.head_dim);
  for (int slot = 0; slot < kSlots; ++slot)
    if (const RowTensor& t = call.tensor[slot]; t.data)
      a.rows[slot] = sequence_rows(t, call.head_dim, call.segment * t.stride[0], t.stride[0], 1);
  a.lse = a.lse_cls = static_cast<float*>(call.lse);
  a.lse_row = call.heads, a.lse_sequence = call.tokens * call.heads, a.lse_clip = call.segment * a.lse_sequence;
  const auto clamp = [&](int64_t offset) {
    return offset > call.segment ? call.segment : offset < -call.segment ? -call.segment : offset;
  };
  for (int64_t i = 0; i < call.num_shifts; ++i) {
    const ChannelShift& shift = call.shifts[i];
    a.range[a.ranges++] = {int(shift.first), int(shift.last), int(clamp(shift.offset))};
  }
  complete(a, call.scale);
  return a;
}

}  // namespace

const char* mixing_forward(const MixingArgs& call, void* stream) {
  return launch_sequences_forward(arguments_of(call), call.frames, call.element, stream);
}

int64_t mixing_backward_floats(const MixingArgs& call) {
  return sequences_backward_floats(call.tokens, call.head_dim, call.frames * call.heads);
}

const char* mixing_backward(const MixingArgs& call, float* workspace, void* stream) {
  return launch_sequences_backward(arguments_of(call), call.frames, call.element, workspace, stream);
}

}  // namespace vidattn::cuda
