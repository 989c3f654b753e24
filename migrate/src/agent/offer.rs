//! What this host has for the devices of the VMs it takes over.
//!
//! A checkpoint knows its devices by logical names, `disk:root` and `net:0`. An agent cannot know what they are on its
//! host, so `standby serve --bind` tells: for one VM, or for all that have such a device.

use std::collections::BTreeMap;
use std::str::FromStr;

use segment::VmId;

/// `[VM/]NAME=WHAT`; `{vm}` in WHAT stands for the VM's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    vm: Option<VmId>,
    name: String,
    what: String,
}

impl FromStr for Offer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = "want [VM/]disk:NAME=FILE, [VM/]net:NAME=TAP or [VM/]vsock:0=PATH, like net:0=tap-{vm} or web/disk:root=/srv/web.img";
        let (of, what) = text
            .split_once('=')
            .filter(|(_, what)| !what.is_empty())
            .ok_or(form)?;
        let (vm, name) = match of.split_once('/') {
            Some((vm, name)) => (Some(VmId::new(vm).map_err(|e| e.to_string())?), name),
            None => (None, of),
        };
        let named = ["disk:", "net:", "vsock:"]
            .iter()
            .any(|kind| name.strip_prefix(kind).is_some_and(|rest| !rest.is_empty()));
        if !named {
            return Err(format!("{name:?} is no logical name of a device: {form}"));
        }
        Ok(Self {
            vm,
            name: name.to_owned(),
            what: what.to_owned(),
        })
    }
}

/// What there is for `vm`, by logical name: what names the VM goes before what is for all, and later before earlier.
#[must_use]
pub(super) fn for_vm(offers: &[Offer], vm: &VmId) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for own in [false, true] {
        let of = |offer: &&Offer| match &offer.vm {
            Some(named) => own && named == vm,
            None => !own,
        };
        for offer in offers.iter().filter(of) {
            found.insert(offer.name.clone(), offer.what.replace("{vm}", vm.as_str()));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(offers: &[&str], vm: &str) -> Vec<String> {
        let offers: Vec<Offer> = offers.iter().map(|text| text.parse().unwrap()).collect();
        for_vm(&offers, &VmId::new(vm).unwrap())
            .into_iter()
            .map(|(name, what)| format!("{name}={what}"))
            .collect()
    }

    #[test]
    fn what_names_the_vm_goes_first_and_others_see_none_of_it() {
        let offers = [
            "web/net:0=dmz",
            "net:0=tap-{vm}",
            "db/disk:root=/srv/db=1.img",
            "mail/vsock:0=/run/{vm}.v",
        ];
        assert_eq!(of(&offers, "web"), ["net:0=dmz"]);
        assert_eq!(of(&offers, "db"), ["disk:root=/srv/db=1.img", "net:0=tap-db"]);
        assert_eq!(of(&offers, "mail"), ["net:0=tap-mail", "vsock:0=/run/mail.v"]);
    }

    #[test]
    fn what_is_none_is_refused_with_the_form() {
        for text in [
            "",
            "net:0",
            "net:0=",
            "net:=tap0",
            "tap0=net:0",
            "a b/net:0=tap",
            "/net:0=tap",
        ] {
            let told = text.parse::<Offer>().unwrap_err();
            assert!(!told.is_empty(), "{text}");
        }
    }
}
