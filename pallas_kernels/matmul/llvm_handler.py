"""LLVM IR of the XLA FFI handler around `@panel`: reads XLA's call frame and splits the outputs over XLA's threads.

Hides the C structs of jaxlib/include/xla/ffi/api/c_api.h (API 0.4). Threads claim chunks of outputs from an atomic
counter. The caller claims too and waits only for chunks that others have begun, so a busy or absent pool costs speed,
never a deadlock. Whoever leaves a job last frees it.
"""

from __future__ import annotations

API_MAJOR, API_MINOR = 0, 4  # of the structs below; XLA checks them when the handler is registered
CHUNK_BYTES = 1 << 18  # most weights per claim: large beside the tile that is fetched past a claim's end
LEAST_CHUNKS = 8  # of a matmul that is shared at all: enough to balance
ALONE_BYTES = 1 << 18  # weights that one thread reads before another has woken up...
ALONE_ROWS = 4  # ...with up to so many rows; with more, it takes time in proportion
F32 = 11  # XLA_FFI_DataType_F32

# Places of function pointers in XLA_FFI_Api: they follow 48 bytes of sizes and versions.
_API = {name: 48 + 8 * place for name, place in {"error_destroy": 2, "schedule": 11, "num_threads": 12}.items()}

_TYPES = """
%Version = type { i64, ptr, i32, i32 }               ; struct_size, extension, major, minor
%Metadata = type { i64, %Version, i32, i64 }         ; struct_size, version, traits, state type
%MetadataQuery = type { i64, i32, ptr, ptr }         ; struct_size, type, next, metadata
%Arrays = type { i64, ptr, i64, ptr, ptr }           ; struct_size, extension, size, types, buffers
%Frame = type { i64, ptr, ptr, ptr, i32, %Arrays, %Arrays } ; struct_size, extension, api, context, stage, args, results
%Buffer = type { i64, ptr, i32, ptr, i64, ptr }      ; struct_size, extension, dtype, data, rank, dims
%Call = type { i64, ptr, ptr, ptr, ptr }             ; struct_size, extension, and the call's one to three arguments
; one matmul shared by threads; the two counters that all of them write have a cache line each
%Job = type { i64, [56 x i8], i64, [56 x i8], i64, %Work }  ; next chunk, chunks done, references, work
%Work = type { ptr, ptr, ptr, i64, i64, i64, i64, i64, i1 } ; x, w, out, rows, in, outs, chunk, chunks, wide

declare ptr @malloc(i64)
declare void @free(ptr)
declare i32 @sched_yield()
declare i64 @llvm.umin.i64(i64, i64)
"""

_JOBS = """
define internal void @work_on(ptr %job) nounwind {
entry:
  %done = getelementptr %Job, ptr %job, i32 0, i32 2
  %p = getelementptr %Job, ptr %job, i32 0, i32 5
  %work = load %Work, ptr %p
  %x = extractvalue %Work %work, 0
  %w = extractvalue %Work %work, 1
  %out = extractvalue %Work %work, 2
  %rows = extractvalue %Work %work, 3
  %in = extractvalue %Work %work, 4
  %outs = extractvalue %Work %work, 5
  %chunk = extractvalue %Work %work, 6
  %chunks = extractvalue %Work %work, 7
  %wide = extractvalue %Work %work, 8
  %value_bytes = select i1 %wide, i64 4, i64 2
  %row_bytes = shl i64 %in, 1
  br label %claim
claim:
  %index = atomicrmw add ptr %job, i64 1 monotonic
  %is_left = icmp ult i64 %index, %chunks
  br i1 %is_left, label %compute, label %exit
compute:
  %begin = mul i64 %index, %chunk
  %left = sub i64 %outs, %begin
  %size = call i64 @llvm.umin.i64(i64 %left, i64 %chunk)
  %w_offset = mul i64 %begin, %row_bytes
  %w_begin = getelementptr i8, ptr %w, i64 %w_offset
  %out_offset = mul i64 %begin, %value_bytes
  %out_begin = getelementptr i8, ptr %out, i64 %out_offset
  call void @panel(ptr %x, ptr %w_begin, ptr %out_begin, i64 %rows, i64 %in, i64 %size, i64 %outs, i1 %wide)
  %before = atomicrmw add ptr %done, i64 1 release
  br label %claim
exit:
  ret void
}

define internal void @leave(ptr %job) nounwind {
entry:
  %references = getelementptr %Job, ptr %job, i32 0, i32 4
  %before = atomicrmw sub ptr %references, i64 1 acq_rel
  %is_last = icmp eq i64 %before, 1
  br i1 %is_last, label %drop, label %exit
drop:
  call void @free(ptr %job)
  br label %exit
exit:
  ret void
}

define internal void @help(ptr %job) nounwind {
entry:
  call void @work_on(ptr %job)
  call void @leave(ptr %job)
  ret void
}
"""

_XLA_CALLS = f"""
define internal i1 @call_api(ptr %api, i64 %function_offset, ptr %call) nounwind {{ ; whether it succeeded
entry:
  %p = getelementptr i8, ptr %api, i64 %function_offset
  %function = load ptr, ptr %p
  %error = call ptr %function(ptr %call)
  %good = icmp eq ptr %error, null
  br i1 %good, label %exit, label %drop
drop:
  %destroy_call = alloca %Call
  store %Call {{ i64 24, ptr null, ptr null, ptr null, ptr null }}, ptr %destroy_call
  %p_error = getelementptr %Call, ptr %destroy_call, i32 0, i32 2
  store ptr %error, ptr %p_error
  %p_destroy = getelementptr i8, ptr %api, i64 {_API["error_destroy"]}
  %destroy = load ptr, ptr %p_destroy
  call void %destroy(ptr %destroy_call)
  br label %exit
exit:
  ret i1 %good
}}

define internal i64 @num_threads(ptr %api, ptr %context) nounwind {{ ; 1 where XLA has no pool
entry:
  %count = alloca i64
  store i64 1, ptr %count
  %call = alloca %Call
  store %Call {{ i64 32, ptr null, ptr null, ptr null, ptr null }}, ptr %call
  %p_context = getelementptr %Call, ptr %call, i32 0, i32 2
  store ptr %context, ptr %p_context
  %p_count = getelementptr %Call, ptr %call, i32 0, i32 3
  store ptr %count, ptr %p_count
  %good = call i1 @call_api(ptr %api, i64 {_API["num_threads"]}, ptr %call)
  %value = load i64, ptr %count
  %result = select i1 %good, i64 %value, i64 1
  ret i64 %result
}}
"""


def _run() -> str:
    """`@run(api, context, work)`: all of a matmul, alone or with helpers."""
    return f"""
define internal void @run(ptr %api, ptr %context, %Work %work) nounwind {{
entry:
  %chunks = extractvalue %Work %work, 7
  %is_small = icmp eq i64 %chunks, 1
  br i1 %is_small, label %alone, label %ask
ask:
  %threads = call i64 @num_threads(ptr %api, ptr %context)
  %others = sub i64 %threads, 1
  %useful = sub i64 %chunks, 1
  %helpers = call i64 @llvm.umin.i64(i64 %others, i64 %useful)
  %no_helpers = icmp slt i64 %helpers, 1
  br i1 %no_helpers, label %alone, label %share
share:
  %job_size = ptrtoint ptr getelementptr (%Job, ptr null, i64 1) to i64
  %job = call ptr @malloc(i64 %job_size)
  %no_memory = icmp eq ptr %job, null
  br i1 %no_memory, label %alone, label %fill
fill:
  store i64 0, ptr %job
  %done = getelementptr %Job, ptr %job, i32 0, i32 2
  store i64 0, ptr %done
  %p_references = getelementptr %Job, ptr %job, i32 0, i32 4
  %references = add i64 %helpers, 1
  store i64 %references, ptr %p_references
  %p_work = getelementptr %Job, ptr %job, i32 0, i32 5
  store %Work %work, ptr %p_work
  %call = alloca %Call
  store %Call {{ i64 40, ptr null, ptr null, ptr @help, ptr null }}, ptr %call
  %p_context = getelementptr %Call, ptr %call, i32 0, i32 2
  store ptr %context, ptr %p_context
  %p_job = getelementptr %Call, ptr %call, i32 0, i32 4
  store ptr %job, ptr %p_job
  br label %schedule
schedule:
  %index = phi i64 [0, %fill], [%index_next, %scheduled]
  %good = call i1 @call_api(ptr %api, i64 {_API["schedule"]}, ptr %call)
  br i1 %good, label %scheduled, label %not_scheduled
not_scheduled:
  call void @leave(ptr %job)
  br label %scheduled
scheduled:
  %index_next = add i64 %index, 1
  %again = icmp ult i64 %index_next, %helpers
  br i1 %again, label %schedule, label %join
join:
  call void @work_on(ptr %job)
  br label %wait
wait:
  %now = load atomic i64, ptr %done acquire, align 8
  %all = icmp eq i64 %now, %chunks
  br i1 %all, label %finish, label %pause
pause:
  %unused = call i32 @sched_yield()
  br label %wait
finish:
  call void @leave(ptr %job)
  ret void
alone:
  %x = extractvalue %Work %work, 0
  %w = extractvalue %Work %work, 1
  %out = extractvalue %Work %work, 2
  %rows = extractvalue %Work %work, 3
  %in = extractvalue %Work %work, 4
  %outs = extractvalue %Work %work, 5
  %wide = extractvalue %Work %work, 8
  call void @panel(ptr %x, ptr %w, ptr %out, i64 %rows, i64 %in, i64 %outs, i64 %outs, i1 %wide)
  ret void
}}
"""


def _handler(name: str, chunk_multiple: int) -> str:
    return f"""
define ptr @{name}(ptr %frame_pointer) nounwind {{
entry:
  %frame = load %Frame, ptr %frame_pointer
  %extension = extractvalue %Frame %frame, 1
  %is_query = icmp ne ptr %extension, null
  br i1 %is_query, label %query, label %execute
query: ; XLA asks for metadata (extension type 1) instead of work
  %p_type = getelementptr %MetadataQuery, ptr %extension, i32 0, i32 1
  %type = load i32, ptr %p_type
  %wants_metadata = icmp eq i32 %type, 1
  br i1 %wants_metadata, label %describe, label %execute
describe:
  %p_metadata = getelementptr %MetadataQuery, ptr %extension, i32 0, i32 3
  %metadata = load ptr, ptr %p_metadata
  %p_major = getelementptr %Metadata, ptr %metadata, i32 0, i32 1, i32 2
  store i32 {API_MAJOR}, ptr %p_major
  %p_minor = getelementptr %Metadata, ptr %metadata, i32 0, i32 1, i32 3
  store i32 {API_MINOR}, ptr %p_minor
  %p_traits = getelementptr %Metadata, ptr %metadata, i32 0, i32 2
  store i32 0, ptr %p_traits
  %p_state = getelementptr %Metadata, ptr %metadata, i32 0, i32 3
  store i64 0, ptr %p_state
  ret ptr null
execute:
  %api = extractvalue %Frame %frame, 2
  %context = extractvalue %Frame %frame, 3
  %args = extractvalue %Frame %frame, 5, 4
  %results = extractvalue %Frame %frame, 6, 4
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
  %wide = icmp eq i32 %dtype, {F32}
  %x_dims = extractvalue %Buffer %x_buffer, 5
  %rows = load i64, ptr %x_dims
  %w_dims = extractvalue %Buffer %w_buffer, 5
  %outs = load i64, ptr %w_dims
  %p_in = getelementptr i64, ptr %w_dims, i64 1
  %in = load i64, ptr %p_in
  %row_bytes = shl i64 %in, 1
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
  %w7 = insertvalue %Work %w6, i64 %chunks, 7
  %work = insertvalue %Work %w7, i1 %wide, 8
  call void @run(ptr %api, ptr %context, %Work %work)
  ret ptr null
}}
"""


def module(name: str, *, chunk_multiple: int) -> str:
    """IR of handler `@name`: operands x and weight, result out. A chunk is a multiple of `chunk_multiple` outputs."""
    return "\n".join([_TYPES, _JOBS, _XLA_CALLS, _run(), _handler(name, chunk_multiple)])
