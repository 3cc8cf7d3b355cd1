// When each page is needed next, and so which page may go: the policy of paged memory, without a byte of data.
//
// With a cyclic order (an optimizer visits its pages in the same order at every step) the page that goes is the one whose
// next use is farthest away (Belady 1966). On a cycle longer than the memory that keeps a part of the pages for good and
// lets the rest stream past, where least-recently-used would miss every time. Without an order it is the least recently
// used one. Pages outside the order count as never used again.
#pragma once

#include <cstdint>
#include <limits>
#include <set>
#include <utility>
#include <vector>

#include "common/check.h"

namespace pyfastpeft {

class PageOrder {
 public:
  static constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

  void resize(std::int64_t pages) {
    position_.resize(std::size_t(pages), -1);
    used_.resize(std::size_t(pages), 0);
    may_go_.resize(std::size_t(pages), false);
    is_absent_.resize(std::size_t(pages), true);
  }

  // The pages in the order they will be used, over and over; empty: not known.
  void set(std::vector<std::int64_t> order) {
    std::vector<std::int64_t> position(position_.size(), -1);
    for (std::size_t i = 0; i < order.size(); ++i) {
      const std::int64_t page = order[i];
      check(page >= 0 && page < std::int64_t(position.size()), "paged memory: the order names page ", page,
            ", expected 0 to ", std::int64_t(position.size()) - 1);
      check(position[std::size_t(page)] < 0, "paged memory: the order names page ", page, " twice, expected once");
      position[std::size_t(page)] = std::int64_t(i);
    }
    order_ = std::move(order);
    position_ = std::move(position);
    cursor_ = 0;
    candidates_.clear();
    others_.clear();
    absent_.clear();
    for (std::size_t page = 0; page < position_.size(); ++page) {
      if (may_go_[page]) insert(std::int64_t(page));
      if (is_absent_[page] && position_[page] >= 0) absent_.insert(position_[page]);
    }
  }

  void use(std::int64_t page) {
    withdraw(page);
    used_[std::size_t(page)] = ++clock_;
    const std::int64_t position = position_[std::size_t(page)];
    if (position >= 0) cursor_ = (position + 1) % std::int64_t(order_.size());
  }

  // How many uses away the next one is.
  std::int64_t distance(std::int64_t page) const {
    const std::int64_t position = position_[std::size_t(page)], n = std::int64_t(order_.size());
    return position < 0 ? kNever : (position - cursor_ + n) % n;
  }

  // A page that may go, and one that may not (it is held, being moved, or gone).
  void offer(std::int64_t page) {
    if (may_go_[std::size_t(page)]) return;
    may_go_[std::size_t(page)] = true;
    insert(page);
  }
  void withdraw(std::int64_t page) {
    if (!may_go_[std::size_t(page)]) return;
    may_go_[std::size_t(page)] = false;
    const std::int64_t position = position_[std::size_t(page)];
    if (position >= 0)
      candidates_.erase(position);
    else
      others_.erase({used_[std::size_t(page)], page});
  }

  // The page to let go next; -1: none may.
  std::int64_t victim() const {
    if (!others_.empty()) return others_.begin()->second;
    if (candidates_.empty()) return -1;
    const auto next = candidates_.lower_bound(cursor_);
    return order_[std::size_t(next == candidates_.begin() ? *candidates_.rbegin() : *std::prev(next))];
  }

  // Absent: not in memory and not on its way.
  void set_absent(std::int64_t page, bool absent) {
    is_absent_[std::size_t(page)] = absent;
    const std::int64_t position = position_[std::size_t(page)];
    if (position < 0) return;
    if (absent)
      absent_.insert(position);
    else
      absent_.erase(position);
  }

  // Calls f(page) for absent pages of the order, the soonest needed first, until it returns false.
  template <typename F>
  void each_absent(F&& f) const {
    std::vector<std::int64_t> soon;  // f may change the set
    auto at = absent_.lower_bound(cursor_);
    for (std::size_t i = 0; i < absent_.size() && i < kLooked; ++i, ++at) {
      if (at == absent_.end()) at = absent_.begin();
      soon.push_back(order_[std::size_t(*at)]);
    }
    for (const std::int64_t page : soon)
      if (!f(page)) return;
  }

 private:
  static constexpr std::size_t kLooked = 64;  // absent pages looked at in one go

  void insert(std::int64_t page) {
    const std::int64_t position = position_[std::size_t(page)];
    if (position >= 0)
      candidates_.insert(position);
    else
      others_.insert({used_[std::size_t(page)], page});
  }

  std::vector<std::int64_t> order_;
  std::vector<std::int64_t> position_;  // by page; -1: not in the order
  std::vector<std::int64_t> used_;      // by page: when, by clock_
  std::vector<bool> may_go_, is_absent_;
  std::set<std::int64_t> candidates_, absent_;              // positions
  std::set<std::pair<std::int64_t, std::int64_t>> others_;  // (used, page) of candidates outside the order
  std::int64_t cursor_ = 0;                                 // the position expected next
  std::int64_t clock_ = 0;
};

}  // namespace pyfastpeft
