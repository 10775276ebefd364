// Sums of the gradient of a bias table in the backward pass.
#pragma once
#include "backward_rows.cuh"

namespace vidattn::cuda {

// The gradient of a table, in tables of the warps' own. For one query all keys fall on different rows, so a lane takes
// a key and adds one query after the other. Lanes without a key add zeros to rows that no other lane is at.
//
// The first entry of a warp's table is for query 0 and a key that is kSpareRows behind the warp's last one.
template <class Group, int kKeys>
class RowSums {
 public:
  // The warp's table lies `table` bytes from the start of shared memory, or of what the block has in global memory.
  __device__ RowSums(const Group& group, int buffer, bool wanted, int table, int key, int count)
      : group_(group), wanted_(wanted) {
    const int lane = threadIdx.x % 32;
    buffer += int(gpu::shared_address(gpu::shared_memory<unsigned char>()));
    put_ = buffer + lane / 4 * 32 + (lane % 4 * 8 ^ lane / 16 % 2 * 16);
    read_ = buffer + lane % kKeys * 32;
    if (!wanted) return;
    const int last = group.bias_offset(key + count - 1);
    const int own = lane < count ? group.bias_offset(key + lane) : last + 4 * (lane - count + 1);
    table_ = table + last - own + 4 * kSpareRows;
  }
  __device__ __forceinline__ bool wanted() const { return wanted_; }

  // dS of two keys of tile t with two of 8 queries. A key has the eight side by side; of every second four keys, the
  // halves are exchanged, so that neither this nor the next meets a bank twice.
  __device__ __forceinline__ void put(int t, const float (&ds)[4]) const {
    gpu::store_shared(put_ + t * 512, make_float2(ds[0], ds[1]));
    gpu::store_shared(put_ + t * 512 + 256, make_float2(ds[2], ds[3]));
  }

  // The 8 queries from `query` on are complete.
  template <bool kShared>
  __device__ __forceinline__ void add(int query) const {
    __syncwarp();
    const int4* rows = reinterpret_cast<const int4*>(group_.bias_offsets(query));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 ds = gpu::load_shared<float4>(read_ + (half ^ threadIdx.x / 4 % 2) * 16);
      const int4 row = rows[half];
      add_one<kShared>(row.x, ds.x), add_one<kShared>(row.y, ds.y);
      add_one<kShared>(row.z, ds.z), add_one<kShared>(row.w, ds.w);
    }
  }

 private:
  template <bool kShared>
  __device__ __forceinline__ void add_one(int row, float ds) const {
    if (int(threadIdx.x % 32) < kKeys) {
      if (kShared || group_.gradients().backward.table_is_shared)
        *reinterpret_cast<float*>(gpu::shared_memory<unsigned char>() + table_ + row) += ds;
      else
        *reinterpret_cast<float*>(reinterpret_cast<char*>(group_.gradients().block_tables()) + table_ + row) += ds;
    }
    __syncwarp();
  }

  const Group& group_;
  bool wanted_;
  int put_, read_;  // addresses in shared memory
  int table_ = 0;   // where this lane's key would have row 0
};

}  // namespace vidattn::cuda
