"""LLVM IR that reads a matmul's operands and cuts its outputs into pieces for threads; each piece is a `@panel`."""

from __future__ import annotations

from pallas_kernels.native.handler import F32, S32

CHUNK_BYTES = 1 << 18  # most weights per piece: large beside the tile that is fetched past a piece's end
LEAST_CHUNKS = 8  # of a matmul that is shared at all: enough to balance
ALONE_BYTES = 1 << 18  # weights that one thread reads before another has woken up...
ALONE_ROWS = 4  # ...with up to so many rows; with more, it takes time in proportion


def _compute(value_bytes: int) -> str:
    return f"""
%Work = type {{ ptr, ptr, ptr, i64, i64, i64, i64, i1 }} ; x, w, out, rows, in, outs, outs per piece, wide

define internal void @compute(ptr %work_pointer, i64 %index) nounwind {{
entry:
  %work = load %Work, ptr %work_pointer
  %x = extractvalue %Work %work, 0
  %w = extractvalue %Work %work, 1
  %out = extractvalue %Work %work, 2
  %rows = extractvalue %Work %work, 3
  %in = extractvalue %Work %work, 4
  %outs = extractvalue %Work %work, 5
  %chunk = extractvalue %Work %work, 6
  %wide = extractvalue %Work %work, 7
  %value_bytes = select i1 %wide, i64 4, i64 2
  %row_bytes = mul i64 %in, {value_bytes}
  %begin = mul i64 %index, %chunk
  %left = sub i64 %outs, %begin
  %size = call i64 @llvm.umin.i64(i64 %left, i64 %chunk)
  %w_offset = mul i64 %begin, %row_bytes
  %w_begin = getelementptr i8, ptr %w, i64 %w_offset
  %out_offset = mul i64 %begin, %value_bytes
  %out_begin = getelementptr i8, ptr %out, i64 %out_offset
  call void @panel(ptr %x, ptr %w_begin, ptr %out_begin, i64 %rows, i64 %in, i64 %size, i64 %outs, i1 %wide)
  ret void
}}
"""


def module(chunk_multiple: int, value_bytes: int) -> str:
    """IR of `@execute` and `@compute` around `@panel`, for operands of `value_bytes` a value.

    A piece is a multiple of `chunk_multiple` outputs.
    """
    return f"""{_compute(value_bytes)}
define internal void @execute(ptr %api, ptr %context, ptr %args, ptr %results) nounwind {{
entry:
  %p_x = load ptr, ptr %args
  %p_p_w = getelementptr ptr, ptr %args, i64 1
  %p_w = load ptr, ptr %p_p_w
  %p_out = load ptr, ptr %results
  %x_buffer = load %Buffer, ptr %p_x
  %w_buffer = load %Buffer, ptr %p_w
  %out_buffer = load %Buffer, ptr %p_out
  %x = extractvalue %Buffer %x_buffer, 3
  %w = extractvalue %Buffer %w_buffer, 3
  %out = extractvalue %Buffer %out_buffer, 3
  %dtype = extractvalue %Buffer %out_buffer, 2
  %is_f32 = icmp eq i32 %dtype, {F32}
  %is_s32 = icmp eq i32 %dtype, {S32}
  %wide = or i1 %is_f32, %is_s32
  %x_dims = extractvalue %Buffer %x_buffer, 5
  %rows = load i64, ptr %x_dims
  %w_dims = extractvalue %Buffer %w_buffer, 5
  %outs = load i64, ptr %w_dims
  %p_in = getelementptr i64, ptr %w_dims, i64 1
  %in = load i64, ptr %p_in
  %row_bytes = mul i64 %in, {value_bytes}
  %rows_counted = call i64 @llvm.umax.i64(i64 %rows, i64 {ALONE_ROWS})
  %weight_bytes = mul i64 %row_bytes, %outs
  %cost = mul i64 %weight_bytes, %rows_counted
  %is_cheap = icmp ult i64 %cost, {ALONE_BYTES * ALONE_ROWS}
  %most = udiv i64 {CHUNK_BYTES}, %row_bytes
  %fair = udiv i64 %outs, {LEAST_CHUNKS}
  %wanted = call i64 @llvm.umin.i64(i64 %most, i64 %fair)
  %tiles = udiv i64 %wanted, {chunk_multiple}
  %some_tiles = call i64 @llvm.umax.i64(i64 %tiles, i64 1)
  %shared = mul i64 %some_tiles, {chunk_multiple}
  %chunk = select i1 %is_cheap, i64 %outs, i64 %shared
  %outs_up = add i64 %outs, %chunk
  %outs_ceil = sub i64 %outs_up, 1
  %chunks = udiv i64 %outs_ceil, %chunk
  %w0 = insertvalue %Work poison, ptr %x, 0
  %w1 = insertvalue %Work %w0, ptr %w, 1
  %w2 = insertvalue %Work %w1, ptr %out, 2
  %w3 = insertvalue %Work %w2, i64 %rows, 3
  %w4 = insertvalue %Work %w3, i64 %in, 4
  %w5 = insertvalue %Work %w4, i64 %outs, 5
  %w6 = insertvalue %Work %w5, i64 %chunk, 6
  %w7 = insertvalue %Work %w6, i1 %wide, 7
  %work = alloca %Work
  store %Work %w7, ptr %work
  call void @run(ptr %api, ptr %context, ptr %work, i64 %chunks)
  ret void
}}
"""
