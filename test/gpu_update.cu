// The decision whether to update on the GPU: every verdict, and bit for bit the CPU's state.
#include "../layers/update.cuh"
#include "gpu.h"

namespace {
struct Case {
    double loss, norm; // of the update
    Verdict verdict;
    UpdateRule rule = {10, 1, 6, 6};
};

// Losses about 2, norms about 1, which is where clipping begins.
void add_usual(std::vector<Case>& cases, size_t count) {
    for (size_t i = 0, n = cases.size(); i < count; i++, n++)
        cases.push_back({2 + 0.01 * hash_normal(1, n), 1 + 0.01 * hash_normal(2, n), Verdict::update});
}
std::vector<Case> every_verdict() {
    const double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
    std::vector<Case> cases;
    add_usual(cases, 64);
    for (double x : {nan, inf, -inf}) cases.push_back({x, 1, Verdict::bad_loss});
    for (double x : {nan, inf}) cases.push_back({2, x, Verdict::bad_norm});
    cases.push_back({0, 0, Verdict::no_labels, {0, 1, 6, 6}});
    add_usual(cases, 59);
    cases.push_back({50, 1, Verdict::update}); // the 126th finite loss: of fewer than 128 nothing is an outlier
    add_usual(cases, 2);
    cases.push_back({500, 1, Verdict::outlier_loss}); // behind 128 losses and 129 norms
    cases.push_back({2, 30, Verdict::outlier_norm});
    cases.push_back({5000, 300, Verdict::outlier_loss});
    cases.push_back({50000, 3000, Verdict::update, {10, 1, 0, 0}});  // not asked for
    cases.push_back({2, 1e5, Verdict::outlier_norm, {10, 0, 0, 6}}); // and no clipping
    add_usual(cases, 140);                                           // the window has forgotten them
    cases.push_back({3, 1, Verdict::outlier_loss}); // 100 deviations, of a window that begins anywhere in the ring
    cases.push_back({2, 2, Verdict::outlier_norm});
    return cases;
}

bool same(double a, double b) { return memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b)); }
bool same(const Outliers& a, const Outliers& b) {
    return a.count == b.count && memcmp(a.value, b.value, sizeof a.value) == 0;
}
bool same(const UpdateState& a, const UpdateState& b) {
    return a.updates == b.updates && same(a.losses, b.losses) && same(a.norms, b.norms) && same(a.loss, b.loss) &&
           same(a.norm, b.norm) && a.verdict == b.verdict && a.adamw.step == b.adamw.step &&
           same(a.adamw.grad_scale, b.adamw.grad_scale) && a.adamw.skip == b.adamw.skip;
}
} // namespace

// Means and variances divide by 128, which is exact, so that contracted products change no bit.
TEST_CASE("gpu update: every verdict, and the CPU's state bit for bit (small)") {
    const Gpu gpu = the_gpu();
    UpdateState cpu, back;
    UpdateState* place = (UpdateState*)device_allocate(gpu, sizeof cpu);
    copy_to_device(gpu, place, &cpu, sizeof cpu);
    size_t number = 0;
    for (const Case& c : every_verdict()) {
        CAPTURE(number);
        cpu.loss_sum = c.loss * c.rule.counted, cpu.norm_squared = c.norm * c.norm;
        copy_to_device(gpu, &place->loss_sum, &cpu.loss_sum, sizeof(double));
        copy_to_device(gpu, &place->norm_squared, &cpu.norm_squared, sizeof(double));
        update_decide(Cpu(), &cpu, c.rule);
        update_decide(gpu, place, c.rule);
        copy_to_host(gpu, &back, place, sizeof back);
        CHECK(cpu.verdict == c.verdict);
        CHECK(same(back, cpu));
        number++;
    }
    CUDA_CHECK(cudaFree(place));
}
