// The log: one line a step on the terminal, the same as log.jsonl in the run's folder.
#pragma once
#include "device.h"
#include "options.h"
#include <fstream>
#include <sys/file.h>

inline std::string json_text(const std::string& s) {
    std::string out = "\"";
    for (unsigned char c : s) {
        char code[8];
        if (c == '"' || c == '\\') out += '\\', out += char(c);
        else if (c < 32) snprintf(code, sizeof code, "\\u%04x", c), out += code;
        else out += char(c);
    }
    return out + "\"";
}

// A number as JSON has it: NaN and infinities become null.
inline std::string json_number(double x) {
    char s[32];
    snprintf(s, sizeof s, "%.9g", x);
    return std::isfinite(x) ? s : "null";
}

struct Log {
    FILE* file = nullptr; // log.jsonl; null on other ranks and without --out
    bool terminal = false;
};

// What is asked for otherwise than at the run's last start in this folder, as "--seed 1 -> 2, --lr 1e-4 -> 2e-5", and
// whether the training data are others (`data`: their fingerprint).
inline std::string log_changes(const Options& options, const std::string& folder, const std::string& data) {
    const std::string is_start = "{\"event\": \"start\"";
    std::string start, line, changes;
    for (std::ifstream file(folder + "/log.jsonl"); std::getline(file, line);)
        if (line.compare(0, is_start.size(), is_start) == 0) start = line;
    auto changed = [&](const char* name, const std::string& now, size_t& from) { // from: where the value of then begins
        const std::string key = std::string(", \"") + name + "\": ";
        const size_t at = start.find(key);
        from = at + key.size();
        return at != std::string::npos && start.compare(from, now.size(), now) != 0;
    };
    size_t from = 0;
    auto compare = [&](auto& value, const char* name, char, const char*, const char*) {
        const std::string now = json_text(option_text(value));
        if (!strcmp(name, "resume") || !changed(name, now, from)) return;
        size_t end = from + 1; // of the text, whose own quotes stand behind a backslash
        while (end < start.size() && start[end] != '"') end += start[end] == '\\' ? 2 : 1;
        const std::string was = start.substr(from + 1, end - from - 1);
        changes += (changes.empty() ? "--" : ", --") + std::string(name) + " " + (was.empty() ? "none" : was) + " -> " +
                   (now.size() > 2 ? now.substr(1, now.size() - 2) : "none");
    };
    options_visit(options, compare, [](const char*) {});
    if (changed("data", json_text(data), from))
        changes += std::string(changes.empty() ? "" : ", ") + "the contents of the training data";
    return changes;
}

// Opens log.jsonl for appending on rank 0, and writes the options of this run and its data's fingerprint as its first
// line. A new run does not go on in the log of one that left no checkpoint: that becomes log.jsonl.old.
inline Log log_open(const Options& options, const std::string& folder, int rank, const std::string& data, bool anew) {
    Log log;
    log.terminal = rank == 0;
    if (rank != 0 || folder.empty()) return log;
    std::string path = folder + "/log.jsonl";
    auto open_locked = [&] {
        log.file = fopen(path.c_str(), "a+");
        if (!log.file) fail("%s: %s", path.c_str(), strerror(errno));
        if (flock(fileno(log.file), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
            fail("another run writes to %s", folder.c_str());
    };
    open_locked();
    if (anew && fseek(log.file, 0, SEEK_END) == 0 && ftell(log.file) > 0) {
        if (rename(path.c_str(), (path + ".old").c_str()) != 0) fail("%s: %s", path.c_str(), strerror(errno));
        fclose(log.file);
        open_locked();
    }
    const bool cut = fseek(log.file, -1, SEEK_END) == 0 && fgetc(log.file) != '\n'; // the last line of a killed run
    fseek(log.file, 0, SEEK_END);
    if (cut) fputc('\n', log.file);
    std::string line = "{\"event\": \"start\"";
    auto field = [&](auto& value, const char* name, char, const char*, const char*) {
        line += std::string(", \"") + name + "\": " + json_text(option_text(value));
    };
    options_visit(options, field, [](const char*) {});
    fprintf(log.file, "%s, \"data\": %s}\n", line.c_str(), json_text(data).c_str());
    fflush(log.file);
    return log;
}

inline void log_close(Log& log) {
    if (log.file && fclose(log.file) != 0) fail("log.jsonl: %s", strerror(errno));
    log.file = nullptr;
}

// Appends {"event": event, names[0]: values[0], ...}.
inline void log_values(Log& log, const char* event, std::initializer_list<std::pair<const char*, double>> values) {
    if (!log.file) return;
    fprintf(log.file, "{\"event\": \"%s\"", event);
    for (auto& [name, value] : values) fprintf(log.file, ", \"%s\": %s", name, json_number(value).c_str());
    fprintf(log.file, "}\n");
    if (fflush(log.file) != 0) fail("log.jsonl: %s", strerror(errno));
}

// One line of the run's story on rank 0's terminal.
__attribute__((format(printf, 2, 3))) inline void log_note(const Log& log, const char* format, ...) {
    if (!log.terminal) return;
    va_list args;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
    fflush(stdout);
}
