//! A machine's network while it runs: the link and what has come over it.

use super::receiver::Receiver;
use super::{Link, NetError, Network};
use crate::world::bell::Bell;

/// A network and its state.
#[derive(Debug)]
pub(crate) struct Attached {
    network: Network,
    bell: Bell,
    /// In this order: the receiver's thread must not see the link end.
    up: Option<(Receiver, Link)>,
}

impl Attached {
    /// Lets frames come in over `link`, and ring `bell`.
    pub(crate) fn new(link: Link, bell: Bell) -> Result<Attached, NetError> {
        let mut attached = Attached {
            network: link.network.clone(),
            bell,
            up: None,
        };
        attached.listen(link)?;
        Ok(attached)
    }

    fn listen(&mut self, link: Link) -> Result<(), NetError> {
        let receiver = link.listen(self.bell.clone())?;
        self.up = Some((receiver, link));
        Ok(())
    }

    /// Takes the link down, until another machine is on it.
    pub(crate) fn take_down(&mut self) {
        self.up = None;
    }

    /// The same network again, from its beginning.
    pub(crate) fn put_up(&mut self) -> Result<(), NetError> {
        self.take_down();
        self.listen(Link::open(self.network.clone())?)
    }

    /// Whether a frame waits.
    pub(crate) fn waits(&self) -> bool {
        let up = self.up.as_ref();
        up.is_some_and(|(receiver, _)| receiver.inbox().count() > 0)
    }

    /// The next frame that has come.
    pub(crate) fn receive(&self) -> Option<Vec<u8>> {
        self.up.as_ref()?.0.inbox().pop()
    }

    /// Sends a frame, or drops it.
    pub(crate) fn send(&mut self, frame: &[u8]) {
        if let Some((_, link)) = &mut self.up {
            link.send(frame);
        }
    }

    /// Why the link is lost, if it is: a sentence.
    pub(crate) fn post_mortem(&mut self) -> Option<String> {
        let (receiver, link) = self.up.as_mut()?;
        Some(link.post_mortem(receiver.lost()?))
    }
}
