// The communicator for data in the memory of GPUs, one rank a GPU, upon the host's (the Cpu functions of core/comm.h).
//
// All of it is built of exchanges: messages between this rank and others, started behind a stream's work, moved while
// the stream goes on, and waited for by the stream. That stream is the device's, or, for sums over ranks that go on
// beside the device's work, another one of this rank, `beside`. A message takes one of two ways:
//
//   ipc    The sender writes the message's number into the receiver's flags. A stream of the receiver waits for that
//          number, copies the data out of the sender's memory, which is mapped here, and writes the number back; the
//          sender's stream waits for it before it reuses the data. The copy engine carries data and numbers, and
//          multiprocessors have no part in it. Numbers count the messages of a pair of ranks and only grow: what one
//          rank announces or fetches between two ranks is in the order of one stream.
//   nccl   All messages of an exchange that cannot go by ipc are one group of NCCL's sends and receives.
//
// No deadlock: each rank starts and waits in the order of its program, and what a wait waits for is started by the
// others at the same place of theirs, behind waits that come before it alone, on whichever stream they are. Of all that
// is not over yet, what comes first in the program can therefore go on. So it holds even if the driver puts several
// streams into one queue.
//
// NCCL's kernels need multiprocessors until their peers' run too: two of them that wait on different streams could take
// each other's place, here one, on another rank the other. So the groups share one stream for them: each rank runs one
// at a time, in the order of its program. Computations wait for nobody and always make room.
//
// A watchdog thread looks at what the stream waits for. When that goes on for the group's timeout it ends all ranks and
// names the operation and the ranks that are missing; the host itself may be blocked meanwhile, also inside NCCL.
#include "comm.h"
#include "comm_nccl.h"
#include "comm_sum.h"
#include <condition_variable>
#include <cuda.h>
#include <deque>
#include <future>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace {
// A group's flags: lines of one word for every rank, each word 128 bytes from the next.
//   announced, fetched: written by that rank; announcing, fetching: what is written to it; trial: of comm_open.
enum Line { announced, fetched, announcing, fetching, trial, lines };
constexpr size_t flag_words = 32;
constexpr uint32_t trial_word = 0x51c60000; // plus the rank, at its own place of its line

struct Peer {
    uint8_t* memory = nullptr;           // its memory as it is mapped here; null: it is reached through NCCL
    uint32_t* flags = nullptr;           // likewise
    cudaStream_t stream = nullptr;       // on which its messages are fetched
    uint32_t announced = 0, fetched = 0; // messages to it, from it
};

struct Group {
    Comm comm;
    uint8_t* memory = nullptr;
    size_t bytes = 0;
    uint32_t* flags = nullptr;
    std::vector<Peer> peers;    // (size)
    std::vector<int32_t> ranks; // of the world
    cudaStream_t announce = nullptr;
    cudaEvent_t start = nullptr; // where the stream was at the latest exchange_start
    Nccl* nccl = nullptr;        // shared by groups of the same ranks
    CommTimes times;

    uint32_t* flag(uint32_t* of, Line line, int rank) const {
        return of + (size_t(line) * comm.size + rank) * flag_words;
    }
    bool holds(const void* data, size_t count) const {
        return data >= memory && (const uint8_t*)data + count <= memory + bytes;
    }
};

struct Exchange {
    struct Fetch {
        int peer;
        cudaEvent_t begun, done; // the data are there to be copied, and copied
    };
    struct Announced {
        int peer;
        uint32_t number;
    };
    Group* group;
    std::string operation;
    std::vector<Fetch> fetches;
    std::vector<Announced> sends;
    cudaEvent_t nccl_done = nullptr;               // null: nothing went by NCCL
    std::set<int> nccl_ranks;                      // of the world, with which something did
    std::vector<std::unique_ptr<Exchange>> parts;  // of a sum, in their order
    cudaEvent_t joined = nullptr;                  // of several that went on beside the stream: when all were over
    cudaEvent_t before = nullptr, after = nullptr; // where the stream waits
};
} // namespace

struct CommGpu {
    int device = 0;
    decltype(&cuStreamWriteValue32) write_value = nullptr;
    decltype(&cuStreamWaitValue32) wait_value = nullptr;
    uint8_t* scratch = nullptr; // first what comm_sum uses, on the device's stream, then what is used beside it
    cudaStream_t beside = nullptr, nccl_stream = nullptr, look = nullptr;
    std::thread watchdog;

    std::mutex mutex; // of what follows, which the watchdog shares
    std::condition_variable wake;
    bool ends = false;
    std::vector<std::unique_ptr<Group>> groups;
    std::deque<std::unique_ptr<Exchange>> waited; // in the order of the stream
    std::vector<Exchange*> started;               // in the order of the program, sums by parts
    uint64_t settled = 0;                         // taken from them
    std::vector<cudaEvent_t> events;              // not in use
    std::string host_call;                        // that can block
    double host_timeout = 0, host_waited = 0;
};

namespace {
template <class F> void driver_function(F& function, const char* name) {
    cudaDriverEntryPointQueryResult found;
    CUDA_CHECK(cudaGetDriverEntryPointByVersion(name, (void**)&function, 12000, cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess) fail("update the NVIDIA driver: it has no %s", name);
}

bool is_done(cudaEvent_t event) {
    const cudaError_t status = cudaEventQuery(event);
    if (status != cudaErrorNotReady) CUDA_CHECK(status);
    return status == cudaSuccess;
}
double seconds_between(cudaEvent_t from, cudaEvent_t to) {
    float ms = 0;
    CUDA_CHECK(cudaEventElapsedTime(&ms, from, to));
    return 1e-3 * ms;
}

// Takes the exchanges that are over from the queue; the mutex is held.
void settle(CommGpu& c) {
    for (; !c.waited.empty() && is_done(c.waited.front()->after); c.waited.pop_front(), c.settled++) {
        Exchange& x = *c.waited.front();
        const double all = seconds_between(x.before, x.after);
        std::vector<double> moving(x.group->comm.size); // from each of the others, side by side; what nothing hid
        auto count = [&](Exchange& part) {
            for (Exchange::Fetch& f : part.fetches) {
                const double open = seconds_between(x.before, f.done); // of the copy, at most
                moving[f.peer] += std::max(0.0, std::min(seconds_between(f.begun, f.done), open));
                c.events.insert(c.events.end(), {f.begun, f.done});
            }
            if (part.nccl_done) c.events.push_back(part.nccl_done);
            std::erase(c.started, &part);
        };
        count(x);
        for (const std::unique_ptr<Exchange>& part : x.parts) count(*part);
        const double longest = *std::max_element(moving.begin(), moving.end());
        const double moved = x.nccl_ranks.empty() ? std::min(longest, all) : all;
        x.group->times.moving += moved, x.group->times.waiting += all - moved;
        c.events.insert(c.events.end(), {x.before, x.after});
        if (x.joined) c.events.push_back(x.joined);
    }
}

// The line of flags that says how many messages each rank has fetched from here; empty where the GPU does not tell in a
// second. A thread asks that only the process's end ends: its call can wait for the host's other thread.
std::vector<uint32_t> fetched_flags(const CommGpu& c, const Group& g) {
    auto words = std::make_shared<std::vector<uint32_t>>(g.comm.size * flag_words);
    std::packaged_task<bool()> copy([=, device = c.device, look = c.look, from = g.flag(g.flags, fetched, 0)] {
        return cudaSetDevice(device) == cudaSuccess &&
               cudaMemcpyAsync(words->data(), from, words->size() * 4, cudaMemcpyDeviceToHost, look) == cudaSuccess &&
               cudaStreamQuery(look) == cudaSuccess; // to memory that is not pinned, the copy is over when it returns
    });
    std::future<bool> copied = copy.get_future();
    std::thread(std::move(copy)).detach();
    const bool told = copied.wait_for(std::chrono::seconds(1)) == std::future_status::ready && copied.get();
    return told ? *words : std::vector<uint32_t>();
}

// The ranks that an exchange waits for. What was started before it goes first, within a group and, by NCCL, in all of
// them: so the first that is not over tells whose part has not come. NCCL tells only with whom it is at work.
std::string missing(const CommGpu& c, const Exchange& x) {
    const std::vector<uint32_t> flags = fetched_flags(c, *x.group);
    for (const Exchange* e : c.started) {
        const bool own = e->group == x.group, by_nccl = e->nccl_done && !x.nccl_ranks.empty();
        std::set<int> ranks, among;
        if (by_nccl && !is_done(e->nccl_done)) among = e->nccl_ranks;
        for (const Exchange::Fetch& f : e->fetches)
            if (own && !is_done(f.done)) ranks.insert(x.group->ranks[f.peer]);
        for (const Exchange::Announced& s : e->sends)
            if (own && flags.empty()) among.insert(x.group->ranks[s.peer]);
            else if (own && int32_t(flags[s.peer * flag_words] - s.number) < 0) ranks.insert(x.group->ranks[s.peer]);
        if (!ranks.empty() || !among.empty()) return waiting_for(ranks, among);
    }
    return "";
}

// Ending the process is all the cleaning up: the driver ends what NCCL has on the GPU.
void watch(CommGpu& c) {
    CUDA_CHECK(cudaSetDevice(c.device));
    uint64_t settled = 0;
    double stream_waited = 0;
    WaitClock clock;
    std::unique_lock<std::mutex> lock(c.mutex);
    while (!c.ends) {
        c.wake.wait_for(lock, std::chrono::milliseconds(10));
        const double passed = clock.passed();
        settle(c);
        const Exchange* front = c.waited.empty() ? nullptr : c.waited.front().get();
        const bool waits = front && settled == c.settled && is_done(front->before);
        stream_waited = waits ? stream_waited + passed : 0, settled = c.settled;
        if (waits && stream_waited > front->group->comm.timeout)
            comm_give_up(front->operation + missing(c, *front), front->group->comm.timeout);
        c.host_waited += passed;
        if (!c.host_call.empty() && c.host_waited > c.host_timeout) comm_give_up(c.host_call, c.host_timeout);
        for (const std::unique_ptr<Group>& g : c.groups)
            if (const std::string fault = g->nccl ? nccl_fault(g->nccl) : ""; !fault.empty())
                fail("%s: NCCL: %s", front ? front->operation.c_str() : "between operations", fault.c_str());
    }
}

// While it exists, the watchdog counts how long the host is in a call that can block.
struct HostCall {
    CommGpu& c;
    HostCall(CommGpu& c, const std::string& call, double timeout) : c(c) {
        std::lock_guard<std::mutex> lock(c.mutex);
        c.host_call = call, c.host_timeout = timeout, c.host_waited = 0;
    }
    ~HostCall() {
        std::lock_guard<std::mutex> lock(c.mutex);
        c.host_call.clear();
    }
};

cudaEvent_t event_take(CommGpu& c) {
    std::lock_guard<std::mutex> lock(c.mutex);
    cudaEvent_t event = nullptr;
    if (c.events.empty()) CUDA_CHECK(cudaEventCreate(&event)); // with a clock, for comm_times
    else event = c.events.back(), c.events.pop_back();
    return event;
}

void event_record(CommGpu& c, cudaEvent_t& event, cudaStream_t stream) {
    event = event_take(c);
    CUDA_CHECK(cudaEventRecord(event, stream));
}

// `number` into a flag of another rank's, behind the stream's work; `staged` holds it until it is copied.
void flag_write(CommGpu& c, cudaStream_t stream, uint32_t* to, uint32_t* staged, uint32_t number) {
    REQUIRE(c.write_value(stream, CUdeviceptr(staged), number, 0) == CUDA_SUCCESS, "the stream takes no more work");
    CUDA_CHECK(cudaMemcpyAsync(to, staged, sizeof number, cudaMemcpyDeviceToDevice, stream));
}
// The stream waits until a flag here has reached `number`, counted modulo 2^32.
void flag_wait(CommGpu& c, cudaStream_t stream, uint32_t* flag, uint32_t number) {
    const CUresult status = c.wait_value(stream, CUdeviceptr(flag), number, CU_STREAM_WAIT_VALUE_GEQ);
    REQUIRE(status == CUDA_SUCCESS, "the stream takes no more work");
}

void announce_send(Exchange& x, CommGpu& c, const Message& m) {
    Group& g = *x.group;
    Peer& p = g.peers[m.peer];
    REQUIRE(g.holds(m.send, m.send_bytes), "data lie in the memory that comm_open was given");
    x.sends.push_back({m.peer, ++p.announced});
    flag_write(c, g.announce, g.flag(p.flags, announced, g.comm.rank), g.flag(g.flags, announcing, m.peer),
               p.announced);
}

void fetch_start(Exchange& x, CommGpu& c, const Message& m) {
    Group& g = *x.group;
    Peer& p = g.peers[m.peer];
    REQUIRE(g.holds(m.source, m.receive_bytes), "data lie in the memory that comm_open was given");
    Exchange::Fetch fetch{m.peer, nullptr, nullptr};
    CUDA_CHECK(cudaStreamWaitEvent(p.stream, g.start, 0)); // what it overwrites is done with
    flag_wait(c, p.stream, g.flag(g.flags, announced, m.peer), ++p.fetched);
    event_record(c, fetch.begun, p.stream);
    CUDA_CHECK(cudaMemcpyAsync(m.receive, p.memory + ((const uint8_t*)m.source - g.memory), m.receive_bytes,
                               cudaMemcpyDeviceToDevice, p.stream));
    event_record(c, fetch.done, p.stream);
    flag_write(c, p.stream, g.flag(p.flags, fetched, g.comm.rank), g.flag(g.flags, fetching, m.peer), p.fetched);
    x.fetches.push_back(fetch);
}

// Null when there is nothing to exchange. All that others wait for is announced before anything is waited for.
std::unique_ptr<Exchange> exchange_start(Gpu gpu, Group& g, const std::string& operation,
                                         const std::vector<Message>& messages) {
    CommGpu& c = *gpu.context->comm;
    auto x = std::make_unique<Exchange>(Exchange{&g, operation, {}, {}});
    std::vector<Message> by_nccl;
    CUDA_CHECK(cudaEventRecord(g.start, gpu.stream));
    CUDA_CHECK(cudaStreamWaitEvent(g.announce, g.start, 0));
    for (const Message& m : messages)
        if (g.peers[m.peer].memory) {
            if (m.send_bytes) announce_send(*x, c, m);
        } else if (m.send_bytes + m.receive_bytes) by_nccl.push_back(m), x->nccl_ranks.insert(g.ranks[m.peer]);
    for (const Message& m : messages)
        if (g.peers[m.peer].memory && m.receive_bytes) fetch_start(*x, c, m);
    if (!by_nccl.empty()) { // the first messages connect the ranks, which can block
        const HostCall call(c, operation + " by NCCL" + waiting_for({}, x->nccl_ranks), g.comm.timeout);
        CUDA_CHECK(cudaStreamWaitEvent(c.nccl_stream, g.start, 0));
        nccl_exchange(g.nccl, by_nccl.data(), by_nccl.size(), c.nccl_stream);
        event_record(c, x->nccl_done, c.nccl_stream);
    }
    if (x->fetches.empty() && x->sends.empty() && !x->nccl_done) return nullptr;
    std::lock_guard<std::mutex> lock(c.mutex);
    c.started.push_back(x.get());
    return x;
}

// The stream goes on when all data have come and all of this rank's have been fetched.
void exchange_join(Gpu gpu, const Exchange& x) {
    CommGpu& c = *gpu.context->comm;
    Group& g = *x.group;
    for (const Exchange::Fetch& f : x.fetches) CUDA_CHECK(cudaStreamWaitEvent(gpu.stream, f.done, 0));
    if (x.nccl_done) CUDA_CHECK(cudaStreamWaitEvent(gpu.stream, x.nccl_done, 0));
    for (const Exchange::Announced& s : x.sends) flag_wait(c, gpu.stream, g.flag(g.flags, fetched, s.peer), s.number);
}

// The same for the device's stream; what it costs is counted, and the watchdog looks at it.
void exchange_wait(Gpu gpu, std::unique_ptr<Exchange> x) {
    if (!x) return;
    CommGpu& c = *gpu.context->comm;
    event_record(c, x->before, gpu.stream);
    if (x->joined) CUDA_CHECK(cudaStreamWaitEvent(gpu.stream, x->joined, 0));
    else exchange_join(gpu, *x);
    event_record(c, x->after, gpu.stream);
    std::lock_guard<std::mutex> lock(c.mutex);
    c.waited.push_back(std::move(x));
}

Group& group_of(Gpu gpu, const Comm& comm) {
    if (gpu.context->comm)
        for (const std::unique_ptr<Group>& g : gpu.context->comm->groups)
            if (g->comm.handle == comm.handle) return *g;
    fail("ranks on GPUs talk after comm_open of their group");
}

// message(r) for every other rank r.
template <class F> std::vector<Message> with_others(const Comm& comm, F message) {
    std::vector<Message> messages;
    for (int d = 1; d < comm.size; d++) messages.push_back(message((comm.rank + d) % comm.size));
    return messages;
}

// Elements that fit into `bytes` of the scratch from each of the other ranks, on boundaries of 64.
template <class E> size_t scratch_part(const Comm& comm, size_t bytes) {
    return bytes / sizeof(E) / size_t(comm.size - 1) / 64 * 64;
}
int slot_of(const Comm& comm, int rank) { return rank - (rank > comm.rank); }

// Of the scratch: what comm_sum takes, which is on the device's stream, and each half of the rest.
constexpr size_t sum_bytes = comm_scratch_bytes / 4, half_bytes = (comm_scratch_bytes - sum_bytes) / 2;

// Each rank fetches its own slice from all others, a part at a time, and sums it; the next part is on its way
// meanwhile, into the other half of the scratch. What was exchanged are the parts of `all`.
template <class E> void reduce_scatter(Gpu gpu, Group& g, E* data, const size_t* begin, Exchange& all) {
    const Comm& comm = g.comm;
    const size_t part = scratch_part<E>(comm, half_bytes);
    uint8_t* const first = gpu.context->comm->scratch + sum_bytes;
    E* const scratch[2] = {(E*)first, (E*)(first + half_bytes)};
    auto length_at = [&](int rank, size_t at) {
        const size_t length = begin[rank + 1] - begin[rank];
        return length > at ? std::min(part, length - at) : 0;
    };
    size_t longest = 0;
    for (int r = 0; r < comm.size; r++) longest = std::max(longest, begin[r + 1] - begin[r]);
    auto start = [&](size_t at) {
        const E* mine = data + begin[comm.rank] + at;
        return exchange_start(gpu, g, "reduce-scatter", with_others(comm, [&](int r) {
                                  return Message{r,
                                                 data + begin[r] + at,
                                                 length_at(r, at) * sizeof(E),
                                                 scratch[at / part % 2] + slot_of(comm, r) * part,
                                                 length_at(comm.rank, at) * sizeof(E),
                                                 mine};
                              }));
    };
    std::unique_ptr<Exchange> next = start(0);
    for (size_t at = 0; at < longest; at += part) {
        std::unique_ptr<Exchange> now = std::move(next);
        if (at + part < longest) next = start(at + part);
        if (now) {
            exchange_join(gpu, *now);
            all.nccl_ranks.insert(now->nccl_ranks.begin(), now->nccl_ranks.end());
            all.parts.push_back(std::move(now));
        }
        sum_in_order(gpu, data + begin[comm.rank] + at, scratch[at / part % 2], part, length_at(comm.rank, at),
                     comm.rank, comm.size);
    }
}
} // namespace

void comm_broadcast(Gpu gpu, const Comm& comm, Type type, void* data, size_t count, int root) {
    REQUIRE(root >= 0 && root < comm.size, "the root must be a rank of the group");
    if (comm.size == 1) return;
    const size_t bytes = count * type_size(type), out = comm.rank == root ? bytes : 0;
    auto message = [&](int r) { return Message{r, data, out, data, r == root ? bytes : 0, data}; };
    Group& g = group_of(gpu, comm);
    exchange_wait(gpu, exchange_start(gpu, g, "broadcast", with_others(comm, message)));
}

// Everyone gets all and sums: for the few numbers that are summed so, one exchange is better than two.
void comm_sum(Gpu gpu, const Comm& comm, Type type, void* data, size_t count) {
    if (comm.size == 1) return;
    Group& g = group_of(gpu, comm);
    with_type(type, [&]<class E>() {
        const size_t part = scratch_part<E>(comm, sum_bytes);
        E* const scratch = (E*)gpu.context->comm->scratch;
        for (size_t at = 0; at < count; at += part) {
            const size_t n = std::min(part, count - at), bytes = n * sizeof(E);
            E* mine = (E*)data + at;
            auto message = [&](int r) {
                return Message{r, mine, bytes, scratch + slot_of(comm, r) * part, bytes, mine};
            };
            exchange_wait(gpu, exchange_start(gpu, g, "sum", with_others(comm, message)));
            sum_in_order(gpu, mine, scratch, part, n, comm.rank, comm.size);
        }
    });
}

Shift comm_reduce_scatter_start(Gpu gpu, const Comm& comm, Type type, void* data, const size_t* begin) {
    for (int r = 0; r < comm.size; r++) REQUIRE(begin[r] <= begin[r + 1], "slices must not run backwards");
    if (comm.size == 1) return {comm, nullptr};
    Group& g = group_of(gpu, comm);
    CommGpu& c = *gpu.context->comm;
    auto all = std::make_unique<Exchange>(Exchange{&g, "reduce-scatter", {}, {}});
    Gpu beside = gpu;
    beside.stream = c.beside;
    CUDA_CHECK(cudaEventRecord(g.start, gpu.stream)); // what it sums is there
    CUDA_CHECK(cudaStreamWaitEvent(beside.stream, g.start, 0));
    with_type(type, [&]<class E>() { reduce_scatter(beside, g, (E*)data, begin, *all); });
    event_record(c, all->joined, beside.stream);
    return {comm, all.release()};
}

Shift comm_all_gather_start(Gpu gpu, const Comm& comm, Type type, void* data, const size_t* begin) {
    for (int r = 0; r < comm.size; r++) REQUIRE(begin[r] <= begin[r + 1], "slices must not run backwards");
    if (comm.size == 1) return {comm, nullptr};
    Group& g = group_of(gpu, comm);
    auto place = [&](int r) { return (uint8_t*)data + begin[r] * type_size(type); };
    auto length = [&](int r) { return (begin[r + 1] - begin[r]) * type_size(type); };
    auto message = [&](int r) {
        return Message{r, place(comm.rank), length(comm.rank), place(r), length(r), place(r)};
    };
    return {comm, exchange_start(gpu, g, "all-gather", with_others(comm, message)).release()};
}

Shift shift_start(Gpu gpu, const Comm& comm, Type type, const void* send, size_t send_count, int to, void* receive,
                  size_t receive_count, int from) {
    const std::string operation = shift_operation(comm, send_count, to, receive_count, from);
    if (send_count == 0 && receive_count == 0) return {comm, nullptr};
    std::vector<Message> messages;
    if (send_count > 0) messages.push_back({to, send, send_count * type_size(type), nullptr, 0, nullptr});
    if (receive_count > 0) messages.push_back({from, nullptr, 0, receive, receive_count * type_size(type), send});
    return {comm, exchange_start(gpu, group_of(gpu, comm), operation, messages).release()};
}

void shift_wait(Gpu gpu, Shift& shift) {
    exchange_wait(gpu, std::unique_ptr<Exchange>((Exchange*)shift.backend));
    shift.backend = nullptr;
}

namespace {
// What ranks tell each other to map their memory.
struct IpcHandles {
    uint64_t host, bytes;
    int32_t can;
    cudaIpcMemHandle_t memory, flags;
};

// Ranks with the same number share a host, or believe so: then mapping fails.
uint64_t host_number() {
    char text[512] = "";
    gethostname(text, 256);
    if (FILE* boot = fopen("/proc/sys/kernel/random/boot_id", "r")) {
        const size_t end = strlen(text);
        if (!fgets(text + end, int(sizeof text - end), boot)) text[end] = 0;
        fclose(boot);
    }
    uint64_t number = 0;
    for (const char* at = text; *at; at++) number = hash64(number, uint8_t(*at));
    return number;
}

// Sends a flag to the peer, and fetches a word of its memory and one of its flags, which is known: whether all of it
// works is seen before it is relied on. (There are hosts whose GPUs map each other's memory and read something else.)
bool peer_try(CommGpu& c, Group& g, int rank) {
    Peer& p = g.peers[rank];
    uint32_t *sent = g.flag(g.flags, announcing, rank), *got = g.flag(g.flags, fetching, rank), word = 0;
    auto copy = [&](void* to, const void* from, cudaMemcpyKind kind = cudaMemcpyDeviceToDevice) {
        return cudaMemcpyAsync(to, from, sizeof word, kind, g.announce) == cudaSuccess;
    };
    return c.write_value(g.announce, CUdeviceptr(sent), 1, 0) == CUDA_SUCCESS &&
           copy(g.flag(p.flags, trial, g.comm.rank), sent) && copy(got, p.memory) &&
           copy(got, g.flag(p.flags, trial, rank)) && copy(&word, got, cudaMemcpyDeviceToHost) &&
           cudaStreamSynchronize(g.announce) == cudaSuccess && word == trial_word + uint32_t(rank);
}

// Maps the memory of all ranks that allow it, both ways or not at all.
void map_peers(CommGpu& c, Group& g) {
    const int rank = g.comm.rank, size = g.comm.size;
    IpcHandles mine{host_number(), g.bytes, 0, {}, {}};
    mine.can = cudaIpcGetMemHandle(&mine.memory, g.memory) == cudaSuccess &&
               cudaIpcGetMemHandle(&mine.flags, g.flags) == cudaSuccess;
    const uint32_t known = trial_word + uint32_t(rank);
    CUDA_CHECK(cudaMemcpy(g.flag(g.flags, trial, rank), &known, sizeof known, cudaMemcpyHostToDevice));
    std::vector<IpcHandles> handles(size);
    comm_gather(Cpu(), g.comm, (uint8_t*)handles.data(), (const uint8_t*)&mine, sizeof mine);
    std::vector<uint8_t> mapped(size), all(size_t(size) * size);
    for (int r = 0; r < size; r++) {
        REQUIRE(handles[r].bytes == g.bytes, "ranks give comm_open the same size of memory");
        if (r == rank || handles[r].host != mine.host || !mine.can || !handles[r].can) continue;
        constexpr unsigned lazy = cudaIpcMemLazyEnablePeerAccess;
        Peer& p = g.peers[r];
        mapped[r] = cudaIpcOpenMemHandle((void**)&p.memory, handles[r].memory, lazy) == cudaSuccess &&
                    cudaIpcOpenMemHandle((void**)&p.flags, handles[r].flags, lazy) == cudaSuccess && peer_try(c, g, r);
    }
    cudaGetLastError(); // what could not be mapped is no error
    comm_barrier(g.comm);
    for (int r = 0; r < size; r++) { // seen from here: did its flag come?
        uint32_t word = 0;
        CUDA_CHECK(cudaMemcpy(&word, g.flag(g.flags, trial, r), sizeof word, cudaMemcpyDeviceToHost));
        mapped[r] &= word == 1;
    }
    comm_gather(Cpu(), g.comm, all.data(), mapped.data(), size);
    for (int r = 0; r < size; r++)
        if (!all[rank * size + r] || !all[r * size + rank]) g.peers[r].memory = nullptr;
}

// Transfers go first wherever there is a choice: NCCL's kernels, and sums, wherever a multiprocessor gets free.
void open_stream(cudaStream_t& stream) {
    int least = 0, greatest = 0;
    CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    CUDA_CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest));
}

CommGpu* comm_gpu_open(Gpu gpu) {
    auto* c = new CommGpu;
    c->device = gpu.context->device;
    driver_function(c->write_value, "cuStreamWriteValue32");
    driver_function(c->wait_value, "cuStreamWaitValue32");
    c->scratch = device_allocate(gpu, comm_scratch_bytes);
    open_stream(c->beside), open_stream(c->nccl_stream), open_stream(c->look);
    c->watchdog = std::thread([c] { watch(*c); });
    return c;
}
} // namespace

void comm_open(Gpu gpu, const Comm& comm, void* memory, size_t bytes, Transport transport) {
    if (comm.size == 1) return;
    if (!gpu.context->comm) gpu.context->comm = comm_gpu_open(gpu);
    CommGpu& c = *gpu.context->comm;
    auto opened = std::make_unique<Group>();
    Group& g = *opened;
    g.comm = comm, g.memory = (uint8_t*)memory, g.bytes = bytes, g.peers.resize(comm.size);
    REQUIRE(size_t(lines) * comm.size * flag_words * sizeof(uint32_t) <= comm_flag_bytes, "use fewer ranks");
    g.flags = (uint32_t*)device_allocate(gpu, comm_flag_bytes);
    const int32_t rank = world_rank();
    g.ranks.resize(comm.size);
    comm_gather(Cpu(), comm, g.ranks.data(), &rank, 1);
    open_stream(g.announce);
    CUDA_CHECK(cudaEventCreateWithFlags(&g.start, cudaEventDisableTiming));
    if (transport != Transport::nccl) map_peers(c, g);
    int64_t unmapped = 0;
    for (int r = 0; r < comm.size; r++)
        if (g.peers[r].memory) open_stream(g.peers[r].stream);
        else if (r != comm.rank) unmapped++;
    comm_sum(Cpu(), comm, &unmapped, 1);
    if (unmapped && transport == Transport::ipc)
        fail("--transport ipc: CUDA IPC does not connect %lld of the %d pairs of ranks: use --transport auto",
             (long long)unmapped / 2, comm.size * (comm.size - 1) / 2);
    if (unmapped) {
        const HostCall call(c, "opening NCCL", comm.timeout);
        for (const std::unique_ptr<Group>& other : c.groups)
            if (other->nccl && other->ranks == g.ranks) g.nccl = other->nccl;
        if (!g.nccl) g.nccl = nccl_open(comm);
    }
    std::lock_guard<std::mutex> lock(c.mutex);
    c.groups.push_back(std::move(opened));
}

void comm_close(Gpu gpu) {
    if (!gpu.context->comm) return;
    device_wait(gpu);
    CommGpu& c = *gpu.context->comm;
    {
        std::lock_guard<std::mutex> lock(c.mutex);
        c.ends = true;
    }
    c.wake.notify_all();
    c.watchdog.join();
    gpu.context->comm = nullptr; // the other ranks may still have its memory mapped: the process's end frees it
}

CommTimes comm_times(Gpu gpu, const Comm& comm) {
    if (comm.size == 1) return {};
    CommGpu& c = *gpu.context->comm;
    const Group& g = group_of(gpu, comm);
    std::lock_guard<std::mutex> lock(c.mutex);
    settle(c);
    return g.times;
}

std::string comm_transport(Gpu gpu, const Comm& comm) {
    if (comm.size == 1) return "alone";
    const Group& g = group_of(gpu, comm);
    bool ipc = false;
    for (const Peer& p : g.peers) ipc |= p.memory != nullptr;
    return ipc && g.nccl ? "CUDA IPC and NCCL" : ipc ? "CUDA IPC" : "NCCL";
}
