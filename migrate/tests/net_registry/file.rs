//! The embedded registry's file, and agents that keep it or ask for it.

use migrate::agent::{Agent, AgentError};
use migrate::registry::{Embedded, OpenError, Registry, RegistryAddr, RegistryError};

use crate::conformance::new_vm;
use crate::net_common::*;

#[test]
fn a_registry_in_use_or_damaged_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registry.redb");
    let open = Embedded::open(&path).unwrap();
    let second = Embedded::open(&path).unwrap_err();
    assert!(matches!(second, OpenError::Locked { .. }), "{second}");
    drop(open);
    Embedded::open(&path).unwrap();

    for (what, bytes) in [
        ("text", b"not a database at all".repeat(500)),
        ("short", vec![1, 2, 3]),
    ] {
        let path = dir.path().join(what);
        std::fs::write(&path, bytes).unwrap();
        let damaged = Embedded::open(&path).unwrap_err();
        assert!(
            damaged.to_string().contains("cannot be read"),
            "{what}: {damaged}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_agents_of_one_name_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let a = first_agent(dir.path()).await;
    let registry = RegistryAddr::Agent(a.address().to_owned());
    let other = dir.path().join("other");
    let config = config(&other, "a", registry);
    let refused = Agent::start(config.clone()).await.unwrap_err();
    assert!(
        matches!(&refused, AgentError::Refused(RegistryError::NodeTaken { .. })),
        "{refused}"
    );
    let replacing = migrate::agent::AgentConfig {
        replace: true,
        ..config
    };
    Agent::start(replacing).await.unwrap().stop().await;
    // An agent that does not keep the registry says who does.
    let b = agent_with(dir.path(), "b", &a).await;
    let wrong = Registry::remote(b.address(), &tester())
        .get_vm(&vm("web"))
        .await
        .unwrap_err();
    assert!(
        matches!(&wrong, RegistryError::NotHere { registry, .. } if registry == a.address()),
        "{wrong}"
    );
    // Which an owner asks when it knows its holders only; one that is away is passed over.
    let holders = ["127.0.0.1:1".to_owned(), b.address().to_owned()];
    let found = Registry::of_holders(&holders, &tester()).await.unwrap();
    assert_eq!(found.address(), a.address());
    let none = Registry::of_holders(&holders[..1], &tester()).await.unwrap_err();
    assert!(
        none.is_transient() && none.to_string().contains("127.0.0.1:1"),
        "{none}"
    );
    b.stop().await;
    a.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_goes_on_after_the_agent_was_restarted() {
    let dir = tempfile::tempdir().unwrap();
    let a = first_agent(dir.path()).await;
    let address = a.address().to_owned();
    let r = Registry::remote(&address, &tester());
    r.create_vm(new_vm("web")).await.unwrap();
    a.stop().await;
    assert!(matches!(
        r.get_vm(&vm("web")).await,
        Err(RegistryError::Unavailable { .. })
    ));
    let a = Agent::start(again(dir.path(), "a", RegistryAddr::Embedded, &address))
        .await
        .unwrap();
    assert_eq!(r.get_vm(&vm("web")).await.unwrap().owner, "o1");
    a.stop().await;
    let a = Agent::start(again(dir.path(), "a", RegistryAddr::Embedded, &address))
        .await
        .unwrap();
    // The connection that is kept died unseen.
    assert_eq!(r.get_vm(&vm("web")).await.unwrap().owner, "o1");
    a.stop().await;
}
