"""LLVM IR of an XLA FFI handler that splits a kernel's work over XLA's threads.

Hides the C structs of jaxlib/include/xla/ffi/api/c_api.h (API 0.4). Threads claim pieces of work from an atomic
counter. The caller claims too and waits only for pieces that others have begun, so a busy or absent pool costs speed,
never a deadlock. Whoever leaves a job last frees it.
"""

from __future__ import annotations

API_MAJOR, API_MINOR = 0, 4  # of the structs below; XLA checks them when the handler is registered
S32, F32 = 4, 11  # XLA_FFI_DataType

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
; one kernel call shared by threads; the two counters that all of them write have a cache line each
%Job = type { i64, [56 x i8], i64, [56 x i8], i64, ptr, i64 }  ; next piece, pieces done, references, work, pieces

declare ptr @malloc(i64)
declare void @free(ptr)
declare i32 @sched_yield()
declare i64 @llvm.umin.i64(i64, i64)
declare i64 @llvm.umax.i64(i64, i64)
"""

# The caller's %work outlives every claim: it returns only when all pieces are done.
_JOBS = """
define internal void @work_on(ptr %job) nounwind {
entry:
  %done = getelementptr %Job, ptr %job, i32 0, i32 2
  %p_work = getelementptr %Job, ptr %job, i32 0, i32 5
  %work = load ptr, ptr %p_work
  %p_pieces = getelementptr %Job, ptr %job, i32 0, i32 6
  %pieces = load i64, ptr %p_pieces
  br label %claim
claim:
  %index = atomicrmw add ptr %job, i64 1 monotonic
  %is_left = icmp ult i64 %index, %pieces
  br i1 %is_left, label %compute, label %exit
compute:
  call void @compute(ptr %work, i64 %index)
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


_RUN = """
define internal void @run(ptr %api, ptr %context, ptr %work, i64 %pieces) nounwind { ; alone or with helpers
entry:
  %is_small = icmp ule i64 %pieces, 1
  br i1 %is_small, label %alone, label %ask
ask:
  %threads = call i64 @num_threads(ptr %api, ptr %context)
  %others = sub i64 %threads, 1
  %useful = sub i64 %pieces, 1
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
  store ptr %work, ptr %p_work
  %p_pieces = getelementptr %Job, ptr %job, i32 0, i32 6
  store i64 %pieces, ptr %p_pieces
  %call = alloca %Call
  store %Call { i64 40, ptr null, ptr null, ptr @help, ptr null }, ptr %call
  %p_context = getelementptr %Call, ptr %call, i32 0, i32 2
  store ptr %context, ptr %p_context
  %p_job = getelementptr %Call, ptr %call, i32 0, i32 4
  store ptr %job, ptr %p_job
  br label %schedule
schedule:
  %index = phi i64 [0, %fill], [%index_next, %scheduled]
  %good = call i1 @call_api(ptr %api, i64 SCHEDULE, ptr %call)
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
  %all = icmp eq i64 %now, %pieces
  br i1 %all, label %finish, label %pause
pause:
  %unused = call i32 @sched_yield()
  br label %wait
finish:
  call void @leave(ptr %job)
  ret void
alone:
  %piece = phi i64 [0, %entry], [0, %ask], [0, %share], [%piece_next, %alone_compute]
  %is_left = icmp ult i64 %piece, %pieces
  br i1 %is_left, label %alone_compute, label %exit
alone_compute:
  call void @compute(ptr %work, i64 %piece)
  %piece_next = add i64 %piece, 1
  br label %alone
exit:
  ret void
}
""".replace("SCHEDULE", str(_API["schedule"]))


def _handler(name: str) -> str:
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
  call void @execute(ptr %api, ptr %context, ptr %args, ptr %results)
  ret ptr null
}}
"""


def module(name: str) -> str:
    """IR of handler `@name`. The kernel defines the two functions it calls:

    `@execute(ptr api, ptr context, ptr args, ptr results)` reads the operands (`%Buffer**`) and calls `@run(api,
    context, work, pieces)`, which calls `@compute(ptr work, i64 piece)` once per piece, on any thread.
    """
    return "\n".join([_TYPES, _JOBS, _XLA_CALLS, _RUN, _handler(name)])
