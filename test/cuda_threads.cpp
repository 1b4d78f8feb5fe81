// The runtime that test/cuda_threads.h declares, and in NCCL's place messages through memory that two ranks share.
#include "cuda_threads.h"
#include "../core/comm_nccl.h"
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <thread>

// The work of a stream, in order.
struct Queue {
    std::mutex mutex;
    std::condition_variable wake;
    std::deque<std::function<void()>> work;
    std::atomic<uint64_t> given = 0, done = 0;

    Queue() {
        std::thread([this] {
            for (std::unique_lock<std::mutex> lock(mutex);;) {
                wake.wait(lock, [this] { return !work.empty(); });
                const std::function<void()> next = std::move(work.front());
                work.pop_front();
                lock.unlock();
                next();
                done++;
                lock.lock();
            }
        }).detach();
    }
};
// When a stream came to where an event was recorded, in nanoseconds; 0: it has not. Who waits keeps the one that was
// the latest then: the next may be recorded on another stream, and come first.
using Mark = std::shared_ptr<std::atomic<int64_t>>;
struct Event {
    std::mutex mutex;
    Mark mark = std::make_shared<std::atomic<int64_t>>(1);

    Mark latest() {
        std::lock_guard<std::mutex> lock(mutex);
        return mark;
    }
};

static int64_t nanoseconds() {
    return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}
template <class F> static void wait_until(F reached) {
    for (int idle = 0; !reached(); idle++) idle < 100 ? std::this_thread::yield() : (void)usleep(20);
}
static void be_late_at_random() { // half a millisecond at most, twice in three times not
    static thread_local std::minstd_rand chance(std::random_device{}());
    if (chance() % 3 == 0) usleep(useconds_t(chance() % 500));
}

void stream_do(cudaStream_t stream, std::function<void()> work) {
    std::lock_guard<std::mutex> lock(stream->mutex);
    stream->given++;
    stream->work.push_back(std::move(work));
    stream->wake.notify_one();
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    static Queue* const one = getenv("CUDA_THREADS") ? new Queue : nullptr;
    *stream = one ? one : new Queue;
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
    return cudaStreamCreateWithFlags(stream, flags);
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    return stream->done == stream->given ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    const uint64_t last = stream->given;
    wait_until([=] { return stream->done >= last; });
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; } // after copies that are over when they return

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return *event = new Event, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    const Mark mark = std::make_shared<std::atomic<int64_t>>(0);
    std::lock_guard<std::mutex> lock(event->mutex);
    event->mark = mark;
    stream_do(stream, [=] { *mark = nanoseconds(); });
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    const Mark mark = event->latest();
    stream_do(stream, [=] { wait_until([&] { return *mark != 0; }); });
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return *event->latest() != 0 ? cudaSuccess : cudaErrorNotReady; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    const Mark mark = event->latest();
    wait_until([&] { return *mark != 0; });
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) {
    const int64_t begin = *from->latest(), end = *to->latest();
    if (begin == 0 || end == 0) return cudaErrorNotReady;
    return *ms = float(1e-6 * double(end - begin)), cudaSuccess;
}

CUresult cuStreamWriteValue32(cudaStream_t stream, CUdeviceptr to, uint32_t value, unsigned) {
    stream_do(stream, [=] { __atomic_store_n((uint32_t*)to, value, __ATOMIC_SEQ_CST); });
    return CUDA_SUCCESS;
}
CUresult cuStreamWaitValue32(cudaStream_t stream, CUdeviceptr at, uint32_t value, unsigned) {
    auto now = [=] { return __atomic_load_n((uint32_t*)at, __ATOMIC_SEQ_CST); };
    stream_do(stream, [=] { wait_until([=] { return int32_t(now() - value) >= 0; }); });
    return CUDA_SUCCESS;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, int,
                                             cudaDriverEntryPointQueryResult* found) {
    *function = (void*)(strcmp(name, "cuStreamWriteValue32") == 0 ? cuStreamWriteValue32 : cuStreamWaitValue32);
    return *found = cudaDriverEntryPointSuccess, cudaSuccess;
}

// Memory of the GPU is a file without a name, which other processes map by way of /proc.
static std::map<void*, cudaIpcMemHandle_t> allocated;
static void* map_file(int file, size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    return memory == MAP_FAILED ? nullptr : memory;
}
cudaError_t cudaMalloc(void** memory, size_t bytes) {
    const int file = int(syscall(SYS_memfd_create, "gpu", 0));
    if (file < 0 || ftruncate(file, off_t(bytes)) != 0) return cudaErrorInvalidValue;
    *memory = map_file(file, bytes);
    allocated[*memory] = {getpid(), file, world_rank(), bytes};
    return *memory ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaFree(void*) { return cudaSuccess; }
cudaError_t cudaMallocHost(void** memory, size_t bytes) { return *memory = malloc(bytes), cudaSuccess; }
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* memory) {
    if (!allocated.count(memory)) return cudaErrorInvalidValue;
    return *handle = allocated[memory], cudaSuccess;
}
static cudaError_t open_handle(void** memory, const cudaIpcMemHandle_t& handle) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", handle.process, handle.file);
    FILE* file = fopen(path, "r+");
    if (!file) return cudaErrorInvalidValue;
    *memory = map_file(fileno(file), handle.bytes);
    fclose(file);
    return *memory ? cudaSuccess : cudaErrorInvalidValue;
}
// CUDA_THREADS_MAPS=others: GPUs of an even and an odd rank map each other's memory, but write and find something else.
cudaError_t cudaIpcOpenMemHandle(void** memory, cudaIpcMemHandle_t handle, unsigned) {
    const char* maps = getenv("CUDA_THREADS_MAPS");
    if (!maps || handle.rank % 2 == world_rank() % 2) return open_handle(memory, handle);
    *memory = mmap(nullptr, handle.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return *memory == MAP_FAILED ? cudaErrorInvalidValue : cudaSuccess;
}
cudaError_t cudaMemset(void* to, int byte, size_t bytes) {
    if (byte != 0 || madvise(to, bytes, MADV_REMOVE) != 0) memset(to, byte, bytes); // no memory for what is not used
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t stream) {
    stream_do(stream, [=] { memset(to, byte, bytes); });
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    stream_do(stream, [=] {
        be_late_at_random();
        memcpy(to, from, bytes);
        std::atomic_thread_fence(std::memory_order_seq_cst);
    });
    return kind == cudaMemcpyDeviceToHost ? cudaStreamSynchronize(stream) : cudaSuccess;
}

int64_t clock64() {
    static thread_local int64_t later = 0;
    return blockIdx.x + threadIdx.x == 0 ? nanoseconds() : later += int64_t(1) << 40;
}

// A slot for each rank that sends, in the memory of the one that receives: filled and emptied in turn.
struct Slot {
    std::atomic<uint32_t> full;
    size_t bytes;
    uint8_t data[1 << 18];
};
struct Nccl {
    int rank;
    std::vector<Slot*> of; // every rank's (size)
};
Nccl* nccl_open(const Comm& comm) {
    void* memory = nullptr;
    cudaIpcMemHandle_t mine = {};
    std::vector<cudaIpcMemHandle_t> handles(comm.size);
    REQUIRE(cudaMalloc(&memory, comm.size * sizeof(Slot)) == cudaSuccess, "there is no memory");
    cudaIpcGetMemHandle(&mine, memory);
    comm_gather(Cpu(), comm, (uint8_t*)handles.data(), (const uint8_t*)&mine, sizeof mine);
    auto* nccl = new Nccl{comm.rank, std::vector<Slot*>(comm.size)};
    for (int r = 0; r < comm.size; r++)
        REQUIRE(open_handle((void**)&nccl->of[r], handles[r]) == cudaSuccess, "memory can be shared");
    comm_barrier(comm);
    return nccl;
}
void nccl_exchange(Nccl* nccl, const Message* message, size_t count, Stream stream) {
    stream_do(stream, [=, messages = std::vector<Message>(message, message + count)]() mutable {
        be_late_at_random();
        auto pass = [&](Message& m) { // what can go on does
            Slot &out = nccl->of[m.peer][nccl->rank], &in = nccl->of[nccl->rank][m.peer];
            if (m.send_bytes > 0 && !out.full) {
                out.bytes = std::min(m.send_bytes, sizeof out.data);
                memcpy(out.data, m.send, out.bytes);
                m.send = (const uint8_t*)m.send + out.bytes, m.send_bytes -= out.bytes;
                out.full = 1;
            }
            if (m.receive_bytes > 0 && in.full) {
                memcpy(m.receive, in.data, in.bytes);
                m.receive = (uint8_t*)m.receive + in.bytes, m.receive_bytes -= in.bytes;
                in.full = 0;
            }
            return m.send_bytes + m.receive_bytes == 0;
        };
        wait_until([&] {
            bool all = true;
            for (Message& m : messages) all &= pass(m);
            return all;
        });
    });
}
std::string nccl_fault(Nccl*) { return ""; }
