// Files that must not be lost or misread: checkpoints, the optimizer shards in them, and weights files.
//
// A checkpoint is a directory DIR/step_NNNNNNNN that is complete or does not have that name. It is written as
// DIR/step_NNNNNNNN.tmp: every rank writes and syncs its own files, rank 0 then writes MANIFEST (sizes and checksums
// of all files, and its own), syncs, renames the directory and syncs DIR; only then older checkpoints go. So at any
// instant the last complete one is intact, whatever dies and whichever call fails.
#pragma once
#include "checksum.h"
#include "comm.h"
#include "config.h"
#include <algorithm>
#include <cerrno>
#include <dirent.h>
#include <fcntl.h>
#include <functional>
#include <sstream>
#include <string>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

// Checks a system call that returns -1 and sets errno; a call that a signal interrupts is made again.
#define FILE_CHECK(call, path) file_check([&] { return int64_t(call); }, #call, path, __FILE__, __LINE__)

template <class F>
inline int64_t file_check(F call, const char* text, const std::string& path, const char* file, int line) {
    int64_t result;
    do result = call();
    while (result < 0 && errno == EINTR);
    if (result >= 0) return result;
    const char* advice = errno == ENOSPC || errno == EDQUOT ? "; free some space or choose another folder"
                         : errno == ENOENT                  ? "; does it exist, on a file system that all ranks share?"
                                                            : "";
    fail("%s: %s%s (%s at %s:%d)", path.c_str(), strerror(errno), advice, text, file, line);
}

struct File {
    int fd = -1;
    std::string path;

    File(int fd, const std::string& path) : fd(fd), path(path) {}
    File(File&& other) : fd(other.fd), path(std::move(other.path)) { other.fd = -1; }
    File(const File&) = delete;
    ~File() {
        if (fd >= 0) close(fd);
    }
};

inline File file_open(const std::string& path) {
    return {int(FILE_CHECK(open(path.c_str(), O_RDONLY | O_CLOEXEC), path)), path};
}
inline File file_create(const std::string& path) { // must not exist yet
    return {int(FILE_CHECK(open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666), path)), path};
}
inline uint64_t file_size(const File& file) {
    struct stat status;
    FILE_CHECK(fstat(file.fd, &status), file.path);
    return uint64_t(status.st_size);
}
inline void file_write(const File& file, const void* data, size_t bytes) {
    for (size_t done = 0; done < bytes;)
        done += size_t(FILE_CHECK(write(file.fd, (const char*)data + done, bytes - done), file.path));
}
inline void file_read_at(const File& file, uint64_t offset, void* data, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
        int64_t n = FILE_CHECK(pread(file.fd, (char*)data + done, bytes - done, off_t(offset + done)), file.path);
        if (n == 0)
            fail("%s: ends at byte %llu, but %llu bytes are needed from byte %llu on: the file is truncated",
                 file.path.c_str(), (unsigned long long)(offset + done), (unsigned long long)bytes,
                 (unsigned long long)offset);
        done += size_t(n);
    }
}
// After this the contents are on the disk; an error that the system had put off is reported here.
inline void file_finish(File& file) {
    FILE_CHECK(fsync(file.fd), file.path);
    int closed = close(file.fd); // never repeated: the descriptor is gone even when this fails
    file.fd = -1;
    if (closed < 0 && errno != EINTR) fail("%s: close: %s", file.path.c_str(), strerror(errno));
}

inline void directory_sync(const std::string& path) {
    File directory = file_open(path);
    FILE_CHECK(fsync(directory.fd) < 0 && errno != EINVAL ? -1 : 0, path); // EINVAL: this file system has no such call
}
inline void directory_make(const std::string& path) { // with its parents; may exist
    for (size_t end = 0; end != std::string::npos;) {
        end = path.find('/', end + 1);
        std::string part = path.substr(0, end);
        FILE_CHECK(mkdir(part.c_str(), 0777) < 0 && errno != EEXIST ? -1 : 0, part);
    }
}
// The names in a directory, sorted; none when it does not exist.
inline std::vector<std::string> directory_list(const std::string& path) {
    std::vector<std::string> names;
    DIR* directory = opendir(path.c_str());
    if (!directory && errno == ENOENT) return names;
    FILE_CHECK(directory ? 0 : -1, path);
    while (dirent* entry = readdir(directory))
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0) names.push_back(entry->d_name);
    closedir(directory);
    std::sort(names.begin(), names.end());
    return names;
}
inline void directory_remove(const std::string& path, const Comm& world = {}) { // of files only
    for (const std::string& name : directory_list(path)) {
        FILE_CHECK(unlink((path + "/" + name).c_str()), path + "/" + name);
        comm_alive(world);
    }
    FILE_CHECK(rmdir(path.c_str()), path);
}

// What one rank contributes: a name, unique over the ranks, and the arrays that follow one another in the file. An
// array in the memory of a GPU comes with a function that brings a part of it to the host.
using Fetch = std::function<void(void* to, const void* from, size_t bytes)>;
struct Piece {
    const void* data;
    size_t bytes;
    Fetch fetch = nullptr;
};
struct CheckpointFile {
    std::string name; // none: nothing is written, only the fetches are called, in which another rank may need this one
    std::vector<Piece> pieces;
};

struct CheckpointEntry {
    std::string name;
    uint64_t bytes = 0;
    uint32_t crc = 0;
};
struct Checkpoint {
    std::string path;
    int64_t step = -1; // -1: there is none
    int ranks = 0;     // that wrote it
    std::vector<CheckpointEntry> files;
};

inline std::string entry_line(const CheckpointEntry& entry) {
    char numbers[64];
    snprintf(numbers, sizeof numbers, " %llu %08x\n", (unsigned long long)entry.bytes, entry.crc);
    return entry.name + numbers;
}

// MANIFEST, a text: title, step, ranks, then `name bytes crc32c` a file; its last line is the checksum of the rest.
constexpr const char* manifest_title = "train_llama checkpoint 1\n";
inline std::string manifest_text(const Checkpoint& checkpoint) {
    std::string text = manifest_title;
    text += "step " + std::to_string(checkpoint.step) + "\nranks " + std::to_string(checkpoint.ranks) + "\n";
    for (const CheckpointEntry& entry : checkpoint.files) text += entry_line(entry);
    char last[32];
    snprintf(last, sizeof last, "crc32c %08x\n", crc32c(0, text.data(), text.size()));
    return text + last;
}

inline bool checkpoint_name_is_plain(const std::string& name) {
    constexpr const char* letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
    return !name.empty() && name.size() < 200 && name[0] != '.' && name != "MANIFEST" && name != "crc32c" &&
           name.find_first_not_of(letters) == std::string::npos;
}

// Reads what manifest_text writes. Written out again it must give the same text: so no damage is read over.
inline bool manifest_parse(const std::string& text, Checkpoint* out) {
    out->files.clear();
    if (text.rfind(manifest_title, 0) != 0) return false;
    std::istringstream in(text.substr(strlen(manifest_title)));
    std::string word;
    in >> word >> out->step >> word >> out->ranks;
    for (CheckpointEntry entry; in >> entry.name && entry.name != "crc32c"; out->files.push_back(entry)) {
        in >> std::dec >> entry.bytes >> std::hex >> entry.crc;
        if (!in || !checkpoint_name_is_plain(entry.name)) return false;
    }
    return out->step >= 0 && out->ranks > 0 && manifest_text(*out) == text;
}

// All ranks' texts, on every rank.
inline std::vector<std::string> gather_text(const Comm& comm, const std::string& mine) {
    std::vector<int64_t> length(comm.size);
    int64_t my_length = int64_t(mine.size());
    comm_gather(Cpu(), comm, length.data(), (const int64_t*)&my_length, 1);
    std::vector<size_t> begin(comm.size + 1, 0);
    for (int r = 0; r < comm.size; r++) begin[r + 1] = begin[r] + size_t(length[r]);
    std::vector<uint8_t> all(begin[comm.size] + 1);
    std::copy(mine.begin(), mine.end(), all.begin() + begin[comm.rank]);
    comm_all_gather(Cpu(), comm, all.data(), begin.data());
    std::vector<std::string> texts;
    for (int r = 0; r < comm.size; r++) texts.emplace_back(all.begin() + begin[r], all.begin() + begin[r + 1]);
    return texts;
}

inline std::string checkpoint_path(const std::string& dir, int64_t step) {
    char name[40];
    snprintf(name, sizeof name, "/step_%08lld", (long long)step);
    return dir + name;
}

// The step in a name step_NNNNNNNN (tail ".tmp" for an unfinished one), or -1 when the name is another.
inline int64_t step_from_name(const std::string& name, const std::string& tail = "") {
    long long step = -1;
    if (sscanf(name.c_str(), "step_%18lld", &step) != 1 || step < 0) return -1;
    return "/" + name == checkpoint_path("", step) + tail ? step : -1;
}

// Names of what a killed save leaves: its own folder, and the one that it was to replace.
inline bool is_unfinished(const std::string& name) {
    return step_from_name(name, ".tmp") >= 0 || step_from_name(name, ".replaced.tmp") >= 0;
}

// The steps of the checkpoints in dir, sound or not, ascending; none when there is no such folder.
inline std::vector<int64_t> checkpoint_steps(const std::string& dir) {
    std::vector<int64_t> steps;
    for (const std::string& name : directory_list(dir))
        if (step_from_name(name) >= 0) steps.push_back(step_from_name(name));
    std::sort(steps.begin(), steps.end());
    return steps;
}

// Calls use(data, bytes) for all that a file holds, a block after the other, in host memory.
template <class Use> void visit_pieces(const CheckpointFile& file, Use use) {
    constexpr size_t block = size_t(4) << 20; // stays in cache between checksum and write
    std::vector<char> fetched;
    for (const Piece& piece : file.pieces)
        for (size_t at = 0; at < piece.bytes; at += block) {
            size_t n = std::min(block, piece.bytes - at);
            const char* data = (const char*)piece.data + at;
            if (piece.fetch) {
                fetched.resize(n);
                piece.fetch(fetched.data(), data, n);
                data = fetched.data();
            }
            use(data, n);
        }
}

// No call here takes long, between signs of life to the ranks that wait: blocks are small, and what was written goes to
// the disk in steps, which are smaller where more ranks share it, and not all at the end.
inline CheckpointEntry write_pieces(const Comm& world, const std::string& folder, const CheckpointFile& from) {
    const uint64_t step = std::max(256 / world.size, 32) * (uint64_t(1) << 20);
    REQUIRE(checkpoint_name_is_plain(from.name), "name the file with letters, digits, '.', '_' and '-'");
    CheckpointEntry entry{from.name};
    File file = file_create(folder + "/" + from.name);
    visit_pieces(from, [&](const char* data, size_t n) {
        entry.crc = crc32c(entry.crc, data, n);
        entry.bytes += n;
        file_write(file, data, n);
        if (entry.bytes / step > (entry.bytes - n) / step) FILE_CHECK(fdatasync(file.fd), file.path);
        comm_alive(world);
    });
    file_finish(file);
    return entry;
}

// tmp becomes path. A checkpoint of that step that is already there changes places with it, and is then pruned as
// unfinished; where the file system cannot exchange two names (NFS, Lustre), it first moves aside.
inline void checkpoint_publish(const Comm& world, const std::string& dir, const std::string& tmp,
                               const std::string& path) {
    directory_sync(tmp);
    if (access(path.c_str(), F_OK) == 0) {
        if (renameat2(AT_FDCWD, tmp.c_str(), AT_FDCWD, path.c_str(), RENAME_EXCHANGE) == 0) return directory_sync(dir);
        std::string aside = path + ".replaced.tmp";
        if (access(aside.c_str(), F_OK) == 0) directory_remove(aside, world);
        FILE_CHECK(rename(path.c_str(), aside.c_str()), path);
    }
    FILE_CHECK(rename(tmp.c_str(), path.c_str()), path);
    directory_sync(dir);
}

// Removes unfinished saves and all but the `keep` newest up to `step` (0: keeps all). Later steps are left alone:
// they belong to a run that this one did not continue, or are damaged.
inline void checkpoint_prune(const Comm& world, const std::string& dir, int64_t step, int keep) {
    for (const std::string& name : directory_list(dir))
        if (is_unfinished(name)) directory_remove(dir + "/" + name, world);
    std::vector<int64_t> steps = checkpoint_steps(dir);
    while (!steps.empty() && steps.back() > step) steps.pop_back();
    for (size_t i = 0; keep > 0 && i + size_t(keep) < steps.size(); i++) {
        // Renamed first: what a kill leaves half removed is not taken for a damaged checkpoint.
        std::string path = checkpoint_path(dir, steps[i]), tmp = path + ".tmp";
        FILE_CHECK(rename(path.c_str(), tmp.c_str()), path);
        directory_remove(tmp, world);
    }
}

// Writes a checkpoint of `step` from all ranks' files and prunes. Collective. Any error ends all ranks with a line
// that names path, call and reason, and leaves the checkpoints that were there.
inline void checkpoint_save(const Comm& world, const std::string& dir, int64_t step,
                            const std::vector<CheckpointFile>& mine, int keep) {
    REQUIRE(step >= 0 && keep >= 0, "step and keep are counts");
    const std::string path = checkpoint_path(dir, step), tmp = path + ".tmp";
    if (world.rank == 0) {
        directory_make(dir);
        if (access(tmp.c_str(), F_OK) == 0) directory_remove(tmp, world);
        FILE_CHECK(mkdir(tmp.c_str(), 0777), tmp);
    }
    comm_barrier(world);
    std::string lines;
    for (const CheckpointFile& file : mine)
        if (file.name.empty()) visit_pieces(file, [](const char*, size_t) {});
        else lines += entry_line(write_pieces(world, tmp, file));
    comm_barrier(world); // all files are on the disk
    std::vector<std::string> all = gather_text(world, lines);
    if (world.rank == 0) {
        Checkpoint made{path, step, world.size, {}};
        std::string text;
        for (const std::string& from_rank : all) text += from_rank;
        std::istringstream in(text);
        for (CheckpointEntry e; in >> e.name >> std::dec >> e.bytes >> std::hex >> e.crc;) made.files.push_back(e);
        text = manifest_text(made);
        File manifest = file_create(tmp + "/MANIFEST");
        file_write(manifest, text.data(), text.size());
        file_finish(manifest);
        checkpoint_publish(world, dir, tmp, path);
        checkpoint_prune(world, dir, step, keep);
    }
    comm_barrier(world);
}

// Reads path/MANIFEST into out: "" or what is wrong. Nothing else is looked at.
inline std::string manifest_fault(const std::string& path, Checkpoint* out) {
    *out = Checkpoint{path, -1, 0, {}};
    int fd = open((path + "/MANIFEST").c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) return std::string("MANIFEST: ") + strerror(errno);
    File file{fd, path + "/MANIFEST"};
    constexpr size_t most = size_t(64) << 20; // a million entries
    std::string text;
    char buffer[1 << 16];
    ssize_t n;
    while ((n = read(fd, buffer, sizeof buffer)) > 0 && text.size() < most) text.append(buffer, size_t(n));
    if (n < 0) return std::string("MANIFEST: ") + strerror(errno);
    return manifest_parse(text, out) ? "" : "MANIFEST: damaged, or of another version";
}

// Reads a whole file against its entry: "" or what is wrong.
inline std::string entry_fault(const Comm& world, const std::string& path, const CheckpointEntry& entry) {
    int fd = open((path + "/" + entry.name).c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) return entry.name + ": " + strerror(errno);
    File file{fd, entry.name};
    CheckpointEntry found{entry.name};
    std::vector<char> buffer(size_t(4) << 20);
    ssize_t n;
    while ((n = read(fd, buffer.data(), buffer.size())) > 0) {
        found.crc = crc32c(found.crc, buffer.data(), size_t(n));
        found.bytes += uint64_t(n);
        comm_alive(world);
    }
    if (n < 0) return entry.name + ": " + strerror(errno);
    if (found.bytes != entry.bytes)
        return entry.name + ": has " + std::to_string(found.bytes) + " bytes, not " + std::to_string(entry.bytes);
    return found.crc == entry.crc ? "" : entry.name + ": the checksum differs, so its contents are damaged";
}

// Verifies one checkpoint, all bytes of it: "" or a line that names the file and what is wrong. Files that the
// manifest does not list are never read, and are no fault.
inline std::string checkpoint_fault(const std::string& path, Checkpoint* out) {
    std::string fault = manifest_fault(path, out);
    for (size_t i = 0; fault.empty() && i < out->files.size(); i++) fault = entry_fault(Comm{}, path, out->files[i]);
    return fault;
}

// The newest sound checkpoint in dir, or one of step -1. Collective: the ranks share the reading, file by file, and
// rank 0 names on stderr what it passes over.
inline Checkpoint checkpoint_newest(const Comm& world, const std::string& dir) {
    auto pass_over = [&](const std::string& path, const std::string& why) {
        if (world.rank == 0) fprintf(stderr, "%s: %s: not used: %s\n", program_name(), path.c_str(), why.c_str());
    };
    std::vector<int64_t> steps;
    comm_barrier(world); // they may have opened their data at different speeds
    if (world.rank == 0) {
        steps = checkpoint_steps(dir);
        for (const std::string& name : directory_list(dir))
            if (is_unfinished(name)) pass_over(dir + "/" + name, "unfinished");
    }
    for (;;) {
        std::string text, fault;
        Checkpoint candidate;
        int64_t step = steps.empty() ? -1 : steps.back();
        comm_broadcast(Cpu(), world, &step, 1, 0);
        if (step < 0) return {};
        const std::string path = checkpoint_path(dir, step);
        if (world.rank == 0) steps.pop_back(), fault = manifest_fault(path, &candidate);
        if (world.rank == 0 && fault.empty()) text = manifest_text(candidate);
        text = gather_text(world, text)[0];
        if (manifest_parse(text, &candidate))
            for (size_t i = world.rank; fault.empty() && i < candidate.files.size(); i += world.size)
                fault = entry_fault(world, path, candidate.files[i]);
        comm_barrier(world); // some read longer than others
        candidate.path = path;
        bool sound = true;
        for (const std::string& from_rank : gather_text(world, fault))
            if (!from_rank.empty()) pass_over(path, from_rank), sound = false;
        if (sound) return candidate;
    }
}

inline void checkpoint_read(const Checkpoint& checkpoint, const std::string& name, uint64_t offset, void* data,
                            size_t bytes) {
    file_read_at(file_open(checkpoint.path + "/" + name), offset, data, bytes);
}

// Optimizer state, sharded: a shard holds the elements [begin, end) of the flat parameter array, first m, then v, then
// the fp32 master copy if there is one. A rank's file is one shard or several, one after the other. A run with another
// number of ranks reads its own ranges from whichever shards hold them.
enum class ShardField { m = 0, v = 1, master = 2 };
constexpr int32_t shard_magic = 0x54504F4C; // "LOPT"
constexpr int32_t shard_version = 1;
struct ShardHeader {
    int32_t magic = shard_magic, version = shard_version;
    uint64_t begin = 0, end = 0;
    int32_t type[3] = {0, 0, -1}; // of m, v, master (Type); -1: not there
    int32_t unused[7] = {};
};
static_assert(sizeof(ShardHeader) == 64);

inline ShardHeader shard_header(size_t begin, size_t end, Type m, Type v, bool has_master) {
    ShardHeader h;
    h.begin = begin, h.end = end;
    h.type[0] = int32_t(m), h.type[1] = int32_t(v), h.type[2] = has_master ? int32_t(Type::f32) : -1;
    return h;
}
inline size_t shard_bytes(const ShardHeader& h, int field) {
    return h.type[field] < 0 ? 0 : size_t(h.end - h.begin) * type_size(Type(h.type[field]));
}

inline std::string shard_name(int rank) {
    char name[40];
    snprintf(name, sizeof name, "optimizer_%05d.bin", rank);
    return name;
}
// One more shard in a file that a rank passes to checkpoint_save. `header` and the arrays must live until then.
inline void shard_add(CheckpointFile& file, const ShardHeader& header, const void* m, const void* v, const void* master,
                      const Fetch& fetch = nullptr) {
    file.pieces.push_back({&header, sizeof header});
    const void* arrays[] = {m, v, master};
    for (int field = 0; field < 3; field++) file.pieces.push_back({arrays[field], shard_bytes(header, field), fetch});
}

struct OptimizerShard {
    std::string path;
    uint64_t offset = 0; // of its header in the file
    ShardHeader header;
};

// Reads and checks the headers of a file's shards.
inline std::vector<OptimizerShard> shards_open(const File& file) {
    const char* path = file.path.c_str();
    const uint64_t size = file_size(file);
    std::vector<OptimizerShard> shards;
    for (uint64_t at = 0, bytes; at < size || at == 0; at += bytes) {
        ShardHeader h;
        if (at > 0 && size - at < sizeof h) fail("%s: its headers and its size do not agree", path);
        file_read_at(file, at, &h, sizeof h);
        if (h.magic != shard_magic) fail("%s: not an optimizer shard (magic %08x)", path, h.magic);
        if (h.version != shard_version) fail("%s: version %d, this program reads %d", path, h.version, shard_version);
        bool sound = h.begin <= h.end && h.end <= uint64_t(1) << 48;
        for (int32_t type : h.type) sound = sound && type >= -1 && type <= int32_t(Type::f64);
        bytes = sizeof h;
        for (int field = 0; sound && field < 3; field++) bytes += shard_bytes(h, field);
        if (!sound || bytes > size - at) fail("%s: its headers and its size do not agree", path);
        shards.push_back({file.path, at, h});
    }
    return shards;
}

// All shards of a checkpoint.
inline std::vector<OptimizerShard> shards_open(const Checkpoint& checkpoint, const Comm& world = {}) {
    std::vector<OptimizerShard> shards;
    for (const CheckpointEntry& entry : checkpoint.files) {
        if (entry.name.rfind("optimizer_", 0) != 0) continue;
        for (OptimizerShard& shard : shards_open(file_open(checkpoint.path + "/" + entry.name)))
            shards.push_back(shard);
        comm_alive(world);
    }
    if (shards.empty()) fail("%s: no optimizer shards", checkpoint.path.c_str());
    return shards;
}

// Fills dst with elements [begin, end) of one field, from as many shards as it takes.
inline void shard_read(const std::vector<OptimizerShard>& shards, ShardField field, Type expected, size_t begin,
                       size_t end, void* dst) {
    const struct {
        const char *name, *option;
    } names[] = {{"m", "--opt_dtype"}, {"v", "--opt_dtype"}, {"master", "--master"}};
    const int index = int(field);
    for (size_t at = begin; at < end;) {
        auto holds = [&](const OptimizerShard& s) { return s.header.begin <= at && at < s.header.end; };
        auto shard = std::find_if(shards.begin(), shards.end(), holds);
        if (shard == shards.end())
            fail("%s: no optimizer shard holds element %zu: the checkpoint is of another model",
                 shards[0].path.substr(0, shards[0].path.rfind('/')).c_str(), at);
        const ShardHeader& h = shard->header;
        if (h.type[index] != int32_t(expected))
            fail("%s: %s is %s in the checkpoint and %s in this run; change %s", shard->path.c_str(), names[index].name,
                 h.type[index] < 0 ? "missing" : type_name(Type(h.type[index])), type_name(expected),
                 names[index].option);
        uint64_t offset = shard->offset + sizeof h + (at - h.begin) * type_size(expected);
        for (int before = 0; before < index; before++) offset += shard_bytes(h, before);
        size_t n = std::min<size_t>(end, h.end) - at;
        char* to = (char*)dst + (at - begin) * type_size(expected);
        file_read_at(file_open(shard->path), offset, to, n * type_size(expected));
        at += n;
    }
}

// A weights file, open (core/config.h has the format).
struct WeightsFile {
    File file;
    Config config;
    Type dtype = Type::f32;
    uint64_t elements = 0;
};

// Opens and checks a weights file; whatever is wrong with it ends all ranks with one line. header_only also takes a
// file that ends after its header.
inline WeightsFile weights_open(const std::string& path, bool header_only = false) {
    WeightsFile w{file_open(path), {}};
    const char* name = path.c_str();
    uint64_t size = file_size(w.file);
    if (size < weights_header_bytes)
        fail("%s: %llu bytes: %s, not a weights file", name, (unsigned long long)size, size ? "too short" : "empty");
    WeightsHeader header;
    file_read_at(w.file, 0, &header, sizeof header);
    w.config = config_from_header(header, name, &w.dtype, &w.elements);
    if (header_only && size == weights_header_bytes) return w;
    if (w.elements < 1 || w.elements > uint64_t(1) << 48)
        fail("%s: %llu elements in the header: damaged", name, (unsigned long long)w.elements);
    uint64_t expected = weights_header_bytes + w.elements * type_size(w.dtype);
    if (size != expected)
        fail("%s: %llu bytes, but %llu by its header: %s; copy or convert it again", name, (unsigned long long)size,
             (unsigned long long)expected, size < expected ? "truncated" : "something follows the weights");
    return w;
}

// Elements [first, first + count) as they are in the file, of type w.dtype.
inline void weights_read(const WeightsFile& w, uint64_t first, size_t count, void* dst) {
    REQUIRE(first <= w.elements && count <= w.elements - first, "read inside the file's elements");
    size_t size = type_size(w.dtype);
    file_read_at(w.file, weights_header_bytes + first * size, dst, count * size);
}
