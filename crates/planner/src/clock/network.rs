//! The links, and when each carries what.
//!
//! Every rank has, for each class of links, a port out and a port in that carry one message at a time. All ranks of a node
//! share ports out and in for each class, which carry as many as the node's bandwidth holds. A message takes all its ports
//! at once, for `bytes / β`, at the first time at which all are free for so long, and arrives α after it left them.
//!
//! Who asks first is served first: an earlier booking is never moved for a later one, but a later one may use a gap that
//! was too short, or came before, the earlier one. So it does not matter that steps are replayed one by one while in
//! virtual time they overlap.

use std::collections::VecDeque;

use moesaic_plan::Rank;
use moesaic_spec::{Bytes, Cluster, LinkClass};

use crate::LinkPrice;

/// Position of a class in arrays by class.
pub(crate) fn class_idx(class: LinkClass) -> usize {
    match class {
        LinkClass::IntraNode => 0,
        LinkClass::InterNode => 1,
    }
}

/// All links of a cluster.
#[derive(Debug)]
pub(crate) struct Network {
    prices: [LinkPrice; 2],
    node_of: Vec<usize>,
    ports: Vec<Port>,
    /// Ports before those of nodes, and whether a class needs the latter: not where the GPUs' ports are the limit anyway.
    first_node_port: usize,
    nodes_limit: [bool; 2],
}

/// When a message was carried.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Transfer {
    pub(crate) class: LinkClass,
    /// Ports taken.
    pub(crate) start: f64,
    /// Ports free again.
    pub(crate) end: f64,
    /// At the receiver.
    pub(crate) arrival: f64,
}

impl Network {
    pub(crate) fn new(cluster: &Cluster, world_size: usize) -> Network {
        let prices = [LinkClass::IntraNode, LinkClass::InterNode].map(|class| LinkPrice::of(cluster, class));
        let node_of: Vec<usize> = (0..world_size).map(|rank| cluster.node_of(rank)).collect();
        let num_nodes = node_of.iter().max().map_or(0, |last| last + 1);
        let nodes_limit = prices.map(|price| price.per_node < cluster.gpus_per_node);
        let gpu_ports = (0..4 * world_size).map(|_| Port::new(1));
        let node_ports = (0..4 * num_nodes).map(|idx| Port::new(prices[idx % 4 / 2].per_node));
        Network {
            ports: gpu_ports.chain(node_ports).collect(),
            first_node_port: 4 * world_size,
            prices,
            node_of,
            nodes_limit,
        }
    }

    pub(crate) fn class(&self, from: Rank, to: Rank) -> LinkClass {
        let same = self.node_of[from.idx()] == self.node_of[to.idx()];
        if same { LinkClass::IntraNode } else { LinkClass::InterNode }
    }

    /// Carries a message that is ready at `sent`. What a rank sends itself takes no time.
    pub(crate) fn carry(&mut self, from: Rank, to: Rank, bytes: Bytes, sent: f64) -> Transfer {
        let class = self.class(from, to);
        if from == to {
            return Transfer { class, start: sent, end: sent, arrival: sent };
        }
        let price = self.prices[class_idx(class)];
        let seconds = price.transfer_s(bytes);
        let ports = self.ports_of(from, to, class);
        let ports = ports.iter().flatten();
        let mut start = sent;
        loop {
            // Ports only ever move the start later, so this ends at the first time that suits all.
            let later = ports.clone().fold(start, |at, &port| self.ports[port].earliest(at, seconds));
            if later == start {
                break;
            }
            start = later;
        }
        for &port in ports {
            self.ports[port].book(start, seconds);
        }
        let end = start + seconds;
        Transfer { class, start, end, arrival: end + price.latency_s }
    }

    /// Forgets what was carried before a time from which on everything will be sent.
    pub(crate) fn forget_before(&mut self, time: f64) {
        for calendar in self.ports.iter_mut().flat_map(|port| &mut port.channels) {
            while calendar.busy.front().is_some_and(|&(_, end)| end <= time) {
                calendar.busy.pop_front();
            }
        }
    }

    fn ports_of(&self, from: Rank, to: Rank, class: LinkClass) -> [Option<usize>; 4] {
        let (out, into) = (2 * class_idx(class), 2 * class_idx(class) + 1);
        let of_node = |rank: Rank, which: usize| self.first_node_port + 4 * self.node_of[rank.idx()] + which;
        let limited = self.nodes_limit[class_idx(class)];
        // Inside a node, what goes out comes in: one of the two is enough.
        let two_nodes = class == LinkClass::InterNode;
        [
            Some(4 * from.idx() + out),
            Some(4 * to.idx() + into),
            limited.then(|| of_node(from, out)),
            (limited && two_nodes).then(|| of_node(to, into)),
        ]
    }
}

/// Carries a fixed number of messages at a time.
#[derive(Debug)]
struct Port {
    channels: Vec<Calendar>,
}

impl Port {
    fn new(channels: usize) -> Port {
        Port { channels: vec![Calendar::default(); channels] }
    }

    /// The first time, not before `at`, from which a channel is free for so long.
    fn earliest(&self, at: f64, seconds: f64) -> f64 {
        let times = self.channels.iter().map(|channel| channel.earliest(at, seconds));
        times.fold(f64::INFINITY, f64::min)
    }

    fn book(&mut self, start: f64, seconds: f64) {
        let free = self.channels.iter_mut().find(|channel| channel.earliest(start, seconds) == start);
        free.expect("a port is booked only when it is free").book(start, seconds);
    }
}

/// When one channel is busy: disjoint, ascending, and joined where they touch.
#[derive(Clone, Debug, Default)]
struct Calendar {
    busy: VecDeque<(f64, f64)>,
}

impl Calendar {
    fn earliest(&self, at: f64, seconds: f64) -> f64 {
        let mut start = at;
        let first = self.busy.partition_point(|&(_, end)| end <= at);
        for &(busy_from, busy_to) in self.busy.range(first..) {
            if start + seconds <= busy_from {
                break;
            }
            start = busy_to;
        }
        start
    }

    fn book(&mut self, start: f64, seconds: f64) {
        let end = start + seconds;
        if end <= start {
            return; // Nothing, or too little for the clock to tell.
        }
        let idx = self.busy.partition_point(|&(from, _)| from < start);
        let joins_previous = idx > 0 && self.busy[idx - 1].1 == start;
        let joins_next = idx < self.busy.len() && self.busy[idx].0 == end;
        match (joins_previous, joins_next) {
            (true, true) => {
                self.busy[idx - 1].1 = self.busy[idx].1;
                self.busy.remove(idx);
            }
            (true, false) => self.busy[idx - 1].1 = end,
            (false, true) => self.busy[idx].0 = start,
            (false, false) => self.busy.insert(idx, (start, end)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_calendar_fills_gaps_and_joins_what_touches() {
        let mut calendar = Calendar::default();
        calendar.book(0.0, 2.0);
        calendar.book(5.0, 1.0);
        assert_eq!(calendar.earliest(0.0, 3.0), 2.0);
        assert_eq!(calendar.earliest(0.0, 4.0), 6.0);
        assert_eq!(calendar.earliest(2.5, 3.0), 6.0);
        assert_eq!(calendar.earliest(7.0, 9.0), 7.0);
        calendar.book(2.0, 3.0);
        assert_eq!(calendar.busy, [(0.0, 6.0)]);
    }

    #[test]
    fn a_port_carries_as_many_as_it_has_channels() {
        let mut port = Port::new(2);
        port.book(0.0, 4.0);
        port.book(0.0, 3.0);
        assert_eq!(port.earliest(0.0, 1.0), 3.0);
        port.book(3.0, 1.0);
        assert_eq!(port.earliest(0.0, 1.0), 4.0);
    }
}
