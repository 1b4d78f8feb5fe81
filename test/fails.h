// Runs what should fail() in a child process and hands back what it printed.
#pragma once
#include <cstdio>
#include <string>
#include <sys/wait.h>
#include <unistd.h>

// The standard error of f() when it ended with a non-zero status, else "". A child that dies by a signal (a crash,
// or 20 s without an end) gives "signal N: ...", which no expected message contains.
// Only where MPI is not up: a forked child of an MPI process must not call it. f must not open an OpenMP region
// either: GNU's threads do not survive a fork.
template <class F> std::string fails_with(F f) {
    fflush(nullptr);
    int ends[2];
    if (pipe(ends)) return "";
    pid_t child = fork();
    if (child == 0) {
        alarm(20);
        dup2(ends[1], 2);
        close(ends[0]), close(ends[1]);
        f();
        _exit(0);
    }
    close(ends[1]);
    std::string message;
    char buffer[4096];
    for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) message.append(buffer, size_t(n));
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    if (WIFSIGNALED(status)) return "signal " + std::to_string(WTERMSIG(status)) + ": " + message;
    return WEXITSTATUS(status) != 0 ? message : "";
}
