//! The conformance suite of a registry: against the embedded one, the same over the wire, and a real etcd of three
//! members; the embedded one's file; and what etcd may do to us.
#![allow(
    clippy::unwrap_used,
    unreachable_pub,
    reason = "a test stops where something fails"
)]

mod conformance;
mod etcd;
mod file;
mod leases;
#[path = "../net_common/mod.rs"]
mod net_common;

use migrate::registry::{Embedded, Etcd, EtcdAccess, Registry};
use net_common::{first_agent, tester};

/// Each check against the embedded registry and against one at an agent, as tests of their own; and all of them against
/// one etcd, each below a prefix of its own.
macro_rules! conform {
    ($($module:ident::$check:ident),* $(,)?) => {
        mod embedded {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $check() {
                let dir = tempfile::tempdir().unwrap();
                let embedded = super::Embedded::open(&dir.path().join("registry.redb")).unwrap();
                super::$module::$check(super::Registry::new(embedded)).await;
            })*
        }
        mod remote {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $check() {
                let dir = tempfile::tempdir().unwrap();
                let agent = super::first_agent(dir.path()).await;
                super::$module::$check(super::Registry::remote(agent.address(), &super::tester())).await;
                agent.stop().await;
            })*
        }
        #[tokio::test(flavor = "multi_thread")]
        async fn etcd_conforms() {
            let etcd = net_common::etcd::Etcd::start(3);
            $({
                println!("{}", stringify!($check));
                let addr = etcd.addr(&stringify!($check).replace('_', "-"));
                let backend = Etcd::new(&addr, &EtcdAccess::default()).unwrap();
                $module::$check(Registry::new(backend)).await;
            })*
        }
    };
}

conform! {
    conformance::a_vm_is_created_once,
    conformance::a_request_that_is_repeated_is_answered_the_same,
    conformance::raising_is_a_compare_and_swap,
    conformance::of_many_that_raise_at_once_one_wins,
    conformance::holders_change_only_under_generation_and_revision,
    conformance::only_the_owner_says_whether_it_runs,
    conformance::a_forgotten_vm_leaves_its_last_generation,
    conformance::a_segment_name_means_one_checkpoint,
    conformance::lists_come_in_pages,
    conformance::a_node_name_is_one_node,
    conformance::the_oldest_records_go_when_there_are_too_many,
    conformance::only_the_owner_says_how_it_fails_over,
    conformance::a_history_has_its_last_entries_and_goes_with_the_vm,
    leases::a_lease_is_held_while_it_is_renewed,
    leases::a_raise_ends_the_lease_of_the_owner_before,
    leases::who_waits_hears_of_changes_and_of_leases,
    leases::a_swap_is_one_at_a_time_under_a_generation,
    leases::a_node_is_drained_and_leaves,
}
