// Tests core/checkpoint.h and core/checksum.h: alone, and over MPI ranks (then without the cases that fork).
#include "../core/checkpoint.h"
#include "check.h"
#include "fails.h"
#include "world.h"
#include <chrono>
#include <csignal>
#include <filesystem>
#include <sys/syscall.h>

// Calls that fail on purpose: the numbered write, fsync or rename of this process sets `error`. These definitions
// take the place of the C library's in the test binary.
static int calls_until_failure = 0, injected_error = 0;
static bool sync_is_quick = false; // a killed process, unlike a machine without power, loses nothing it has written
static bool injected() {
    if (calls_until_failure == 0 || --calls_until_failure > 0) return false;
    errno = injected_error;
    return true;
}
extern "C" ssize_t write(int fd, const void* data, size_t bytes) {
    return fd > 2 && injected() ? -1 : syscall(SYS_write, fd, data, bytes);
}
extern "C" int fsync(int fd) { return injected() ? -1 : sync_is_quick ? 0 : int(syscall(SYS_fsync, fd)); }
extern "C" int rename(const char* from, const char* to) noexcept {
    return injected() ? -1 : int(syscall(SYS_rename, from, to));
}

// Whether this process may fork: fails_with and the kill test do.
static bool alone() {
    bool yes = world().size == 1 && std::string(comm_backend()) == "serial";
    if (!yes && world().rank == 0) MESSAGE("skipped: it forks, which MPI forbids");
    return yes;
}

// A folder of the test's own, the same on all ranks, gone afterwards.
struct Folder {
    char path[40] = "/tmp/test_checkpoint_XXXXXX";
    Folder() {
        if (world().rank == 0) CHECK(mkdtemp(path));
        comm_broadcast(Cpu(), world(), (uint8_t*)path, sizeof path, 0);
    }
    ~Folder() {
        comm_barrier(world());
        std::error_code ignored;
        if (world().rank == 0) std::filesystem::remove_all(path, ignored);
    }
    std::string operator/(const std::string& name) const { return std::string(path) + "/" + name; }
};

static void check_contains(const std::string& text, const std::string& part) {
    CHECK_MESSAGE(text.find(part) != std::string::npos, "'", text, "' lacks '", part, "'");
}
static std::string read_file(const std::string& path) {
    File file = file_open(path);
    std::string text(file_size(file), 0);
    file_read_at(file, 0, text.data(), text.size());
    return text;
}
static void write_file(const std::string& path, const std::string& text) {
    unlink(path.c_str());
    File file = file_create(path);
    file_write(file, text.data(), text.size());
}
static void flip_bit(const std::string& path, uint64_t bit) {
    std::string text = read_file(path);
    text[bit / 8] ^= char(1 << bit % 8);
    write_file(path, text);
}

// What a trainer with `elements` parameters saves at a step: weights from rank 0, a shard from every rank.
constexpr size_t elements = 1003;
static float value(int64_t step, int field, size_t i) { return float(hash_normal(uint64_t(step) * 8 + field, i)); }
static std::vector<size_t> shard_begin(int ranks) {
    std::vector<size_t> begin(ranks + 1);
    for (int r = 0; r <= ranks; r++) begin[r] = elements * r / ranks;
    return begin;
}
static CheckpointFile shard_file(int rank, const ShardHeader& header, const void* m, const void* v,
                                 const void* master) {
    CheckpointFile file{shard_name(rank), {}};
    shard_add(file, header, m, v, master);
    return file;
}
// `rounds`: shards of a file, each far from the next.
static void save(const Comm& comm, const std::string& dir, int64_t step, int keep, int shards = 0, int rounds = 1) {
    if (shards == 0) shards = comm.size;
    std::vector<size_t> begin = shard_begin(shards * rounds);
    std::vector<float> weights(elements), m(elements), master(elements);
    std::vector<bf16> v(elements);
    for (size_t i = 0; i < elements; i++) {
        weights[i] = value(step, 0, i), m[i] = value(step, 1, i);
        v[i] = bf16(value(step, 2, i)), master[i] = value(step, 3, i);
    }
    std::vector<CheckpointFile> files;
    std::vector<ShardHeader> headers(shards * rounds);
    if (comm.rank == 0) files.push_back({"weights.bin", {{&step, 8}, {weights.data(), elements * sizeof(float)}}});
    for (int r = comm.rank; r < shards; r += comm.size) {
        files.push_back({shard_name(r), {}});
        for (int i = r; i < shards * rounds; i += shards) {
            headers[i] = shard_header(begin[i], begin[i + 1], Type::f32, Type::bf16, true);
            shard_add(files.back(), headers[i], &m[begin[i]], &v[begin[i]], &master[begin[i]]);
        }
    }
    checkpoint_save(comm, dir, step, files, keep);
}
static size_t wrong_values(const Checkpoint& c, size_t begin, size_t end) {
    size_t n = end - begin, wrong = 0;
    Buffer<float> weights(n), m(n), master(n);
    Buffer<bf16> v(n);
    int64_t step = -1;
    checkpoint_read(c, "weights.bin", 0, &step, 8);
    checkpoint_read(c, "weights.bin", 8 + begin * sizeof(float), weights.data(), n * sizeof(float));
    const std::vector<OptimizerShard> shards = shards_open(c);
    shard_read(shards, ShardField::m, Type::f32, begin, end, m.data());
    shard_read(shards, ShardField::v, Type::bf16, begin, end, v.data());
    shard_read(shards, ShardField::master, Type::f32, begin, end, master.data());
    for (size_t i = 0; i < n; i++)
        wrong += weights[i] != value(c.step, 0, begin + i) || m[i] != value(c.step, 1, begin + i) ||
                 v[i].bits != bf16(value(c.step, 2, begin + i)).bits || master[i] != value(c.step, 3, begin + i);
    return wrong + (step != c.step);
}
static std::vector<std::string> names_in(const Folder& folder) { return directory_list(folder.path); }

// checkpoint_newest, and what it said.
static Checkpoint newest(const std::string& dir, std::string* said = nullptr) {
    fflush(stderr);
    FILE* file = tmpfile();
    int kept = dup(2);
    dup2(fileno(file), 2);
    Checkpoint found = checkpoint_newest(world(), dir);
    fflush(stderr);
    dup2(kept, 2);
    close(kept);
    char line[512];
    rewind(file);
    while (said && fgets(line, sizeof line, file)) *said += line;
    fclose(file);
    return found;
}

TEST_CASE("CRC-32C: known values, both forms, any split") {
    CHECK(crc32c(0, "123456789", 9) == 0xE3069283u); // the check value of the polynomial's catalogue
    CHECK(crc32c(0, "", 0) == 0);
    uint8_t zeros[32] = {}, ones[32], rising[32];
    memset(ones, 0xff, 32);
    for (int i = 0; i < 32; i++) rising[i] = uint8_t(i);
    CHECK(crc32c(0, zeros, 32) == 0x8A9136AAu); // RFC 3720, B.4
    CHECK(crc32c(0, ones, 32) == 0x62A8AB43u);
    CHECK(crc32c(0, rising, 32) == 0x46DD794Eu);
    std::vector<uint8_t> data(4099);
    for (size_t i = 0; i < data.size(); i++) data[i] = uint8_t(hash64(1, i));
    for (size_t n : {0, 1, 7, 8, 9, 17, 63, 64, 1000, 4099})
        for (size_t offset : {0, 1, 3}) {
            if (offset > n) continue;
            uint32_t whole = crc32c(0, data.data() + offset, n - offset);
            CHECK(crc32c_portable(0, data.data() + offset, n - offset) == whole);
            size_t cut = offset + (n - offset) / 3;
            uint32_t begun = crc32c(0, data.data() + offset, cut - offset);
            CHECK(crc32c(begun, data.data() + cut, n - cut) == whole);
        }
}

TEST_CASE("save, find the newest, read back; shards for any range") {
    Folder folder;
    Comm w = world();
    CHECK(newest(folder / "nothing_here").step == -1);
    save(w, folder / "a/b", 7, 0);
    save(w, folder / "a/b", 100000000, 0); // nine digits
    Checkpoint c = newest(folder / "a/b");
    CHECK(c.step == 100000000);
    CHECK(c.ranks == w.size);
    CHECK(int(c.files.size()) == 1 + w.size);
    CHECK(c.path == folder / "a/b/step_100000000");
    CHECK(wrong_values(c, 0, elements) == 0);
    CHECK(checkpoint_fault(folder / "a/b/step_00000007", &c) == "");
    CHECK(c.step == 7);
    CHECK(wrong_values(c, 0, elements) == 0);
}

TEST_CASE("a save waits for a slow disk longer than for a rank") {
    Comm w = world();
    if (w.size != 3) return; // once is enough: it takes its time
    Folder folder;
    w.timeout = 2;
    const char byte = 7;
    auto slow = [](void* to, const void* from, size_t n) { usleep(200000), memcpy(to, from, n); };
    CheckpointFile file{shard_name(w.rank), {}};
    for (int i = 0; i < (w.rank == 2 ? 25 : 1); i++) file.pieces.push_back({&byte, 1, slow}); // 5 s
    checkpoint_save(w, folder.path, 3, {file}, 0);
    CHECK(newest(folder.path).step == 3);
}

TEST_CASE("resume on another number of ranks: three shards, any range") {
    Folder folder;
    save(world(), folder.path, 5, 0, 3);
    Checkpoint c = newest(folder.path);
    CHECK(c.files.size() == 4);
    for (int ranks : {1, 2, 3, 4, 7}) {
        std::vector<size_t> begin = shard_begin(ranks);
        for (int r = 0; r < ranks; r++) CHECK(wrong_values(c, begin[r], begin[r + 1]) == 0);
    }
    for (uint64_t i = 0; i < 50; i++) {
        size_t a = hash64(2, i) % (elements + 1), b = hash64(3, i) % (elements + 1);
        CHECK(wrong_values(c, std::min(a, b), std::max(a, b)) == 0);
    }
    save(world(), folder / "several", 5, 0, 3, 4);
    const Checkpoint several = newest(folder / "several");
    for (uint64_t i = 0; i < 50; i++) {
        size_t a = hash64(2, i) % (elements + 1), b = hash64(3, i) % (elements + 1);
        CHECK(wrong_values(several, std::min(a, b), std::max(a, b)) == 0);
    }
    if (!alone()) return;
    std::vector<float> to(elements + 1);
    auto read = [&](ShardField field, Type type, size_t begin, size_t end) {
        return fails_with([&] { shard_read(shards_open(c), field, type, begin, end, to.data()); });
    };
    check_contains(read(ShardField::m, Type::bf16, 0, 10), "m is float in the checkpoint and bf16 in this run");
    check_contains(read(ShardField::v, Type::f32, 0, 10), "change --opt_dtype");
    check_contains(read(ShardField::m, Type::f32, 0, elements + 1), "no optimizer shard holds element 1003");
    c.files.erase(c.files.begin() + 2); // the middle shard
    check_contains(read(ShardField::m, Type::f32, 0, elements), "no optimizer shard holds element 334");
    ShardHeader bare = shard_header(0, 1, Type::f32, Type::f32, false);
    checkpoint_save(world(), folder.path, 6, {shard_file(0, bare, to.data(), to.data(), nullptr)}, 0);
    c = newest(folder.path);
    check_contains(read(ShardField::master, Type::f32, 0, 1), "master is missing in the checkpoint and float");
}

TEST_CASE("a checkpoint of the same step takes the place of the old one") {
    Folder folder;
    save(world(), folder.path, 5, 0, 3);
    save(world(), folder.path, 5, 0, 2);
    Checkpoint c = newest(folder.path);
    CHECK(c.files.size() == 3);
    CHECK(wrong_values(c, 0, elements) == 0);
    CHECK(names_in(folder).size() == 1);
}

TEST_CASE("prune keeps the newest") {
    Folder folder;
    Comm w = world();
    for (int64_t step = 1; step <= 5; step++) save(w, folder.path, step, 0);
    CHECK(names_in(folder).size() == 5);
    comm_barrier(w);
    if (w.rank == 0) {
        mkdir((folder / "step_00000003.tmp").c_str(), 0777); // left by a killed save
        write_file(folder / "step_00000003.tmp/weights.bin", "half");
        mkdir((folder / "notes").c_str(), 0777);
        write_file(folder / "step_of_mine", "");
        mkdir((folder / "step_00000009").c_str(), 0777); // later and damaged: neither counted nor removed
    }
    comm_barrier(w);
    save(w, folder.path, 6, 3);
    CHECK(names_in(folder) == std::vector<std::string>{"notes", "step_00000004", "step_00000005", "step_00000006",
                                                       "step_00000009", "step_of_mine"});
    comm_barrier(w);
    save(w, folder.path, 7, 1);
    CHECK(names_in(folder) == std::vector<std::string>{"notes", "step_00000007", "step_00000009", "step_of_mine"});
    CHECK(newest(folder.path).step == 7);
}

TEST_CASE("one flipped bit is found in 200 places, and its file named") {
    Folder folder;
    if (!alone()) return;
    save(world(), folder.path, 1, 0, 3);
    std::string path = folder / "step_00000001";
    std::vector<std::string> names = directory_list(path);
    CHECK(names.size() == 5);
    Checkpoint c;
    for (uint64_t i = 0; i < 200; i++) {
        const std::string& name = names[i % names.size()];
        uint64_t bit = hash64(4, i) % (8 * read_file(path + "/" + name).size());
        flip_bit(path + "/" + name, bit);
        std::string fault = checkpoint_fault(path, &c);
        CHECK_MESSAGE(fault.rfind(name + ": ", 0) == 0, name, " bit ", bit, ": '", fault, "'");
        flip_bit(path + "/" + name, bit);
    }
    CHECK(checkpoint_fault(path, &c) == "");
}

TEST_CASE("every bit of the manifest counts, and so does its length") {
    Folder folder;
    if (!alone()) return;
    save(world(), folder.path, 1, 0, 1);
    std::string path = folder / "step_00000001/MANIFEST", sound = read_file(path);
    Checkpoint c;
    size_t accepted = 0;
    for (size_t bit = 0; bit < 8 * sound.size(); bit++) {
        std::string text = sound;
        text[bit / 8] ^= char(1 << bit % 8);
        accepted += manifest_parse(text, &c);
    }
    for (size_t n = 0; n < sound.size(); n++) accepted += manifest_parse(sound.substr(0, n), &c);
    for (const char* tail : {" ", "\n", "x", "crc32c 00000000\n"}) accepted += manifest_parse(sound + tail, &c);
    CHECK(accepted == 0);
    CHECK(manifest_parse(sound, &c));
    Checkpoint outside{"", 1, 1, {{"../../etc/passwd", 1, 1}}};
    CHECK(!manifest_parse(manifest_text(outside), &c));
    for (const char* text : {"", "hello\n"}) {
        write_file(path, text);
        check_contains(checkpoint_fault(folder / "step_00000001", &c), "MANIFEST: damaged");
    }
    unlink(path.c_str());
    check_contains(checkpoint_fault(folder / "step_00000001", &c), "MANIFEST: No such file");
    check_contains(checkpoint_fault(folder / "step_00000002", &c), "MANIFEST: No such file");
}

TEST_CASE("truncated, longer, missing and foreign files") {
    Folder folder;
    if (!alone()) return;
    save(world(), folder.path, 1, 0, 2);
    std::string path = folder / "step_00000001", shard = path + "/optimizer_00001.bin", sound = read_file(shard);
    Checkpoint c;
    for (size_t n : {size_t(0), size_t(1), size_t(63), sound.size() - 1}) {
        write_file(shard, sound.substr(0, n));
        std::string sizes = std::to_string(n) + " bytes, not " + std::to_string(sound.size());
        CHECK(checkpoint_fault(path, &c) == "optimizer_00001.bin: has " + sizes);
    }
    write_file(shard, sound + "x");
    check_contains(checkpoint_fault(path, &c), "optimizer_00001.bin: has");
    unlink(shard.c_str());
    check_contains(checkpoint_fault(path, &c), "optimizer_00001.bin: No such file");
    write_file(shard, sound);
    write_file(path + "/notes.txt", "the run with the good seed");
    CHECK(checkpoint_fault(path, &c) == "");
    CHECK(wrong_values(c, 0, elements) == 0);
}

TEST_CASE("damaged and unfinished checkpoints are named, and the newest sound one is taken by all ranks") {
    Folder folder;
    Comm w = world();
    for (int64_t step : {10, 20, 30, 40}) save(w, folder.path, step, 0);
    if (w.rank == 0) {
        flip_bit(folder / "step_00000040/optimizer_00000.bin", 1000);
        flip_bit(folder / "step_00000030/MANIFEST", 300);
        mkdir((folder / "step_00000050.tmp").c_str(), 0777);
        mkdir((folder / "step_00000045").c_str(), 0777);
    }
    comm_barrier(w);
    std::string said;
    const std::string me = std::string(program_name()) + ": ";
    Checkpoint c = newest(folder.path, &said);
    CHECK(c.step == 20);
    CHECK(wrong_values(c, 0, elements) == 0);
    if (w.rank == 0)
        CHECK(said == me + (folder / "step_00000050.tmp: not used: unfinished\n") + me +
                          (folder / "step_00000045: not used: MANIFEST: No such file or directory\n") + me +
                          (folder / "step_00000040: not used: optimizer_00000.bin: the checksum differs, "
                                    "so its contents are damaged\n") +
                          me + (folder / "step_00000030: not used: MANIFEST: damaged, or of another version\n"));
    else CHECK(said == "");
}

TEST_CASE("kill -9 at 50 and more random instants of a save: the newest is sound, and no finished save is lost") {
    Folder folder;
    if (!alone()) return;
    int64_t next = 1, unfinished = 0;
    // On a busy machine few kills fall inside a save, for the child often waits for a core then: more rounds.
    for (uint64_t i = 0; i < 50 || (unfinished <= 5 && i < 2000); i++) {
        int ends[2];
        CHECK(pipe(ends) == 0);
        pid_t child = fork();
        sync_is_quick = child == 0;
        if (child == 0)
            for (int64_t step = next;; step++) {
                save(world(), folder.path, step, int(1 + i % 2), 2);
                if (write(ends[1], &step, 8) != 8) _exit(1);
            }
        close(ends[1]);
        // After one to three finished saves, at a hashed moment within about two more.
        int64_t finished = next - 1, saves = 1 + int64_t(hash64(5, i) % 3);
        auto start = std::chrono::steady_clock::now();
        while (finished < next - 1 + saves && read(ends[0], &finished, 8) == 8) {}
        double duration = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / saves;
        usleep(useconds_t(1e6 * duration * 2 * hash_uniform(6, i)));
        kill(child, SIGKILL);
        waitpid(child, nullptr, 0);
        while (read(ends[0], &finished, 8) == 8) {}
        close(ends[0]);
        Checkpoint c = newest(folder.path);
        CHECK((c.step == finished || c.step == finished + 1));
        CHECK(wrong_values(c, 0, elements) == 0);
        unfinished += names_in(folder).size() > 1 + i % 2;
        next = c.step + 1;
    }
    CHECK(unfinished > 5); // there were kills inside a save
}

TEST_CASE("every failing write, fsync or rename ends the save with a line, and leaves the checkpoint before it") {
    Folder folder;
    if (!alone()) return;
    save(world(), folder.path, 1, 1, 2);
    int failures = 0;
    for (int error : {ENOSPC, EIO})
        for (int call = 1;; call++) {
            std::string said = fails_with([&] {
                calls_until_failure = call, injected_error = error;
                save(world(), folder.path, 2, 1, 2);
            });
            Checkpoint c = newest(folder.path);
            CHECK(c.step > 0);
            CHECK(wrong_values(c, 0, elements) == 0);
            if (said.empty()) break;
            failures++;
            check_contains(said, std::string(program_name()) + ": rank 0: " + folder.path);
            check_contains(said, strerror(error));
            check_contains(said, "core/checkpoint.h:");
            CHECK(std::count(said.begin(), said.end(), '\n') == 1);
            if (c.step == 2) { // it failed after the new one had its name
                directory_remove(folder / "step_00000002");
                save(world(), folder.path, 1, 1, 2);
            }
        }
    // 10 pieces and the manifest are written, 4 files and 2 directories synced, 2 names changed: 19 calls.
    CHECK(failures == 2 * 19);
}

TEST_CASE("a signal during a call does not matter") {
    Folder folder;
    if (!alone()) return;
    for (int call = 1; call < 20; call++) {
        calls_until_failure = call, injected_error = EINTR;
        save(world(), folder.path, call, 1, 2);
        CHECK(newest(folder.path).step == call);
    }
    calls_until_failure = 0;
}

TEST_CASE("what checkpoint_save refuses") {
    Folder folder;
    if (!alone()) return;
    int x = 0;
    auto refuses = [&](const std::string& dir, const std::vector<CheckpointFile>& files) {
        return fails_with([&] { checkpoint_save(world(), dir, 1, files, 0); });
    };
    check_contains(refuses(folder.path, {{"a/b", {{&x, 4}}}}), "name the file");
    check_contains(refuses(folder.path, {{"..", {{&x, 4}}}}), "name the file");
    check_contains(refuses(folder.path, {{"MANIFEST", {{&x, 4}}}}), "name the file");
    check_contains(refuses(folder.path, {{"twice", {{&x, 4}}}, {"twice", {{&x, 4}}}}), "twice: File exists");
    write_file(folder / "file", "");
    check_contains(refuses(folder / "file", {{"a", {{&x, 4}}}}), "file/step_00000001.tmp: Not a directory");
    check_contains(refuses("/proc/nowhere", {{"a", {{&x, 4}}}}), "/proc/nowhere: No such file");
    CHECK(newest(folder.path).step == -1);
}

TEST_CASE("shards with a damaged header are refused") {
    Folder folder;
    if (!alone()) return;
    float x[4] = {};
    auto opens = [&](ShardHeader h, size_t floats) {
        std::string text((const char*)&h, sizeof h);
        write_file(folder / "shard", text.append((const char*)x, floats * sizeof(float)));
        return fails_with([&] { shards_open(file_open(folder / "shard")); });
    };
    ShardHeader sound = shard_header(5, 7, Type::f32, Type::f32, false), bad = sound;
    CHECK(opens(sound, 4) == "");
    check_contains(opens(sound, 5), "do not agree"); // a second header, cut off
    check_contains(opens(sound, 3), "do not agree");
    bad.magic = 1;
    check_contains(opens(bad, 4), "not an optimizer shard");
    bad = sound, bad.version = 2;
    check_contains(opens(bad, 4), "version 2");
    bad = sound, bad.begin = 8;
    check_contains(opens(bad, 4), "do not agree");
    bad = sound, bad.end = ~uint64_t(0);
    check_contains(opens(bad, 4), "do not agree");
    bad = sound, bad.type[1] = 77;
    check_contains(opens(bad, 4), "do not agree");
    write_file(folder / "shard", "short");
    check_contains(fails_with([&] { shards_open(file_open(folder / "shard")); }), "truncated");
}

TEST_CASE("weights files: read, and refused") {
    Folder folder;
    if (!alone()) return;
    std::string path = folder / "model.bin";
    std::vector<bf16> data(200);
    for (size_t i = 0; i < data.size(); i++) data[i] = bf16(float(i));
    const WeightsHeader sound = header_from_config(named_configs[0].config, Type::bf16, data.size());
    auto with = [&](const WeightsHeader& h, size_t count) {
        std::string text((const char*)&h, sizeof h);
        write_file(path, text.append((const char*)data.data(), count * sizeof(bf16)));
    };
    auto refuses = [&](bool header_only = false) { return fails_with([&] { weights_open(path, header_only); }); };

    with(sound, 200);
    WeightsFile w = weights_open(path);
    CHECK(w.elements == 200);
    CHECK(w.dtype == Type::bf16);
    CHECK(w.config.C == named_configs[0].config.C);
    Buffer<bf16> part(17);
    weights_read(w, 183, 17, part.data());
    for (size_t i = 0; i < 17; i++) CHECK(float(part[i]) == float(183 + i));
    check_contains(fails_with([&] { weights_read(w, 184, 17, part.data()); }), "inside the file");
    check_contains(fails_with([&] { weights_read(w, ~uint64_t(0), 2, part.data()); }), "inside the file");

    check_contains(fails_with([&] { weights_open(folder / "none.bin"); }), "none.bin: No such file");
    check_contains(fails_with([&] { weights_open(folder.path); }), folder.path);
    write_file(path, "");
    check_contains(refuses(), "model.bin: 0 bytes: empty");
    write_file(path, std::string(1023, 'x'));
    check_contains(refuses(), "1023 bytes: too short");
    write_file(path, std::string(4096, 'x'));
    check_contains(refuses(), "not a weights file");
    with(sound, 199);
    check_contains(refuses(), "1422 bytes, but 1424 by its header: truncated");
    with(sound, 0);
    check_contains(refuses(), "truncated");
    CHECK(refuses(true) == ""); // only the header is asked for
    std::string longer = (with(sound, 200), read_file(path)) + "x";
    write_file(path, longer);
    check_contains(refuses(), "something follows");
    check_contains(refuses(true), "something follows");

    auto change = [&](int word, int32_t to) {
        WeightsHeader bad = sound;
        bad.word[word] = to;
        with(bad, 200);
        std::string said = refuses();
        CHECK(std::count(said.begin(), said.end(), '\n') == 1);
        return said;
    };
    check_contains(change(1, 2), "version 2");
    check_contains(change(2, 9), "element type 9");
    check_contains(change(3, 0), "layers is 0");
    check_contains(change(9, -5), "vocab is -5");
    check_contains(change(19, 1 << 30), "elements in the header: damaged"); // the high word of the count
    check_contains(change(19, -1), "elements in the header: damaged");
    check_contains(change(18, 0), "0 elements in the header: damaged");
    check_contains(change(6, 3), "heads must be a multiple");
}
